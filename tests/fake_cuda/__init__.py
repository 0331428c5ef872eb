"""A CUDA device that computes nothing, for tests of host code on machines without a GPU. See README.md."""
