"""Families of vision-language models: how each arranges images, placeholders and its decoder."""
