"""CLIP text encoders and the pairing of their tokens with those of the language model."""
