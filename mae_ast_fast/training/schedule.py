"""The learning rate of pretraining."""

from __future__ import annotations

from .options import PretrainOptions


def learning_rate(step: int, options: PretrainOptions) -> float:
    """Learning rate of update ``step`` (from 0): linear warm-up from 0, then linear decay to 0 at ``options.steps``."""
    if step < options.warmup_steps:
        return options.lr * step / options.warmup_steps
    return options.lr * (options.steps - step) / max(1, options.steps - options.warmup_steps)
