"""The model classes by their name in config.json."""

from __future__ import annotations

from .mae_ast import MAEAST
from .ssast import SSAST

MODELS: dict[str, type[MAEAST] | type[SSAST]] = {model.model_type: model for model in (MAEAST, SSAST)}
