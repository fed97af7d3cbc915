"""Weights, tokenizers and chat templates: ours and published ones."""
