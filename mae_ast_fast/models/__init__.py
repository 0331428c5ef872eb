"""Models: MAE-AST, SSAST, and their shared parts."""
