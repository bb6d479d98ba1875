"""A vision-language model under a plan: images, prompts, prefill, decoding."""
