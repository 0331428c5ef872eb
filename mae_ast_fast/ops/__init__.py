"""Operations on tensors. Each one checks its input and calls a Triton kernel or plain PyTorch.

The functions here are public; each is documented where it is defined. All names of functional.py are here too.
"""

from . import functional
from .dispatch import KERNEL_DTYPES, check_cu_seqlens, check_dropout, draw_seed, resolve_impl
from .functional import *  # noqa: F403 - its __all__, so that a new operation is here by existing

__all__ = ["KERNEL_DTYPES", "check_cu_seqlens", "check_dropout", "draw_seed", "resolve_impl"]
__all__ += functional.__all__
