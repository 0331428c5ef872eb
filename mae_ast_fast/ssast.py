"""The public path ``mae_ast_fast.ssast``; the code is in ``models.ssast``."""

from .models.ssast import SSAST

__all__ = ["SSAST"]
