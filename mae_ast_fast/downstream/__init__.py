"""Probing and fine-tuning: manifests, classifiers, metrics and figures."""
