"""Experiments: configs, planned rows, and the runner that evaluates and records them."""
