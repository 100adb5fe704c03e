"""Workstation side: a checkpoint becomes a bundle. Needs the `export` extra (torch)."""

import os

# Checkpoints are folders: what transformers and peft do not find there, they must not look for elsewhere.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
