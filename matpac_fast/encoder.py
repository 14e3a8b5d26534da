"""Encoder: what is kept after pre-training."""
