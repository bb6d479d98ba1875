"""Data sets, their samples and batches."""
