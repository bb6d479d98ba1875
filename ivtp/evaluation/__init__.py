"""Evaluation of frozen models: a test loop, metrics with errors, paired statistics."""
