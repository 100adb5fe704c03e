"""Engines: one network ready to run each, dict of arrays in, dict of arrays out."""
