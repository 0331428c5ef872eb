"""Fast, trustworthy pretraining of MAE-AST, the masked autoencoding audio spectrogram transformer.

The public names are imported when they are first used. Without them ``import mae_ast_fast`` does not import PyTorch, so
the command line can set environment variables that PyTorch's libraries read when they are loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import load_fairseq
    from .models.config import MAEASTConfig, SSASTConfig
    from .models.mae_ast import MAEAST
    from .ops.fbank import fbank
    from .ssast import SSAST
    from .training.step import TrainStep

__version__ = "0.1.0"
__all__ = ["MAEAST", "SSAST", "MAEASTConfig", "SSASTConfig", "TrainStep", "fbank", "load_fairseq"]

_SUBMODULES = ("checkpoint", "checkpoints", "devices", "files", "models", "ops", "ssast", "training", "validate")


def __getattr__(name: str) -> Any:
    """A public name, or a submodule that the public names import."""
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .checkpoint import load_fairseq
    from .models.config import MAEASTConfig, SSASTConfig
    from .models.mae_ast import MAEAST
    from .ops.fbank import fbank
    from .ssast import SSAST
    from .training.step import TrainStep

    public = (MAEAST, SSAST, MAEASTConfig, SSASTConfig, TrainStep, fbank, load_fairseq)
    globals().update({value.__name__: value for value in public})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
