"""Workstation side: a checkpoint becomes a bundle. Needs the `export` extra (torch)."""
