"""The learning rate of pretraining."""

from __future__ import annotations

from .options import PretrainOptions


def learning_rate(step: int, options: PretrainOptions) -> float:
    """Rate of update ``step`` (from 0): linear from 0 at the first over the warm-up, then linear to 0 at ``steps``."""
    if step < options.warmup_steps:
        return options.lr * step / options.warmup_steps
    return options.lr * (options.steps - step) / max(1, options.steps - options.warmup_steps)
