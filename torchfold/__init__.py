"""AlphaFold 2 in PyTorch: the twin of jaxfold."""
