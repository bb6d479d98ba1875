"""Load checkpoints: from a folder or the hub, checked before and after the weights are read."""
