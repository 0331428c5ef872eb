"""Checkpoints: official ones, the library's own, and those of a training run."""
