"""Vision towers: how each one's frozen layers are opened between attention and FFN."""
