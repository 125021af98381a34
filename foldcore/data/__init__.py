"""From raw protein files to batches."""
