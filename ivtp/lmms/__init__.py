"""Benchmark tasks of lmms-eval as data sets: documents, prompts, post-processing and metrics."""
