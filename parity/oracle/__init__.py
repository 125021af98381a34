"""DeepMind's published AlphaFold 2.0.0 as an oracle: same weights and features in both codes."""
