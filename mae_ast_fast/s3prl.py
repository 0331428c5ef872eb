"""The public path ``mae_ast_fast.s3prl``; the code is in ``integrations.s3prl``."""

from .integrations.s3prl import Upstream, mae_ast_fast, mae_ast_fast_local, register

__all__ = ["Upstream", "mae_ast_fast", "mae_ast_fast_local", "register"]
