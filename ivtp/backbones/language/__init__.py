"""The language model of a vision-language model: layers, sizes, prefill, key-value cache."""
