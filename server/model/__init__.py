"""Hugging Face's model code, unchanged, with what is ours put in at its seams: attention, linears, overrides, loading."""
