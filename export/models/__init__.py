"""Torch modules that transformers does not have."""
