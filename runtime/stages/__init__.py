"""Stages: each knows one model, none knows another."""
