"""Pretraining: options, updates, evaluation, and the run."""
