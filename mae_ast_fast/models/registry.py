"""The models by name."""

from __future__ import annotations

from .mae_ast import MAEAST
from .ssast import SSAST

MODELS: dict[str, type[MAEAST] | type[SSAST]] = {kind.model_type: kind for kind in (MAEAST, SSAST)}
