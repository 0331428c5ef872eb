"""The learning rate of fine-tuning and of attentive probes."""

from __future__ import annotations

import math


def learning_rate(step: int, num_steps: int, *, peak: float, warmup: float) -> float:
    """Learning rate of a step (from 0): linear from 0 during the warm-up, then half a cosine to 0.

    Args:
        step: Number of the step, from 0.
        num_steps: Steps of the whole training.
        peak: Largest rate.
        warmup: Share of the steps with a rising rate, in [0, 1].
    """
    warmup_steps = warmup * num_steps
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1.0, num_steps - warmup_steps)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
