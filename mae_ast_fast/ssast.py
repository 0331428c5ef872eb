"""The public path ``mae_ast_fast.ssast``; the code is in ``models.config`` and ``models.ssast``."""

from .models.config import SSASTConfig
from .models.ssast import SSAST

__all__ = ["SSAST", "SSASTConfig"]
