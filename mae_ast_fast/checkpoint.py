"""The public path ``mae_ast_fast.checkpoint``; the code is in ``checkpoints.load``."""

from .checkpoints.load import export, load_fairseq, load_mae_ast, load_model
from .checkpoints.step_folder import training_checkpoints

__all__ = ["export", "load_fairseq", "load_mae_ast", "load_model", "training_checkpoints"]
