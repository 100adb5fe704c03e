"""The small reference model: procedural parts and training."""
