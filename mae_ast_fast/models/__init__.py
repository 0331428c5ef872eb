"""Models: MAE-AST, SSAST, and what both share."""
