"""Recordings for training toy models."""

from __future__ import annotations

from pathlib import Path

import numpy as np

RATE = 16000


def write_gliding_tones(folder: Path) -> Path:
    """Write 30 recordings of 0.5 - 4 s in 6 folders, gliding tones that a model can learn; return ``folder``."""
    import soundfile

    rng = np.random.default_rng(0)
    for i in range(30):
        seconds = rng.uniform(0.5, 4.0)
        t = np.arange(int(seconds * RATE)) / RATE
        pitch = 200 * (1 + i % 6) * (1 + 0.3 * np.sin(2 * np.pi * rng.uniform(0.3, 2.0) * t))
        wave = 0.3 * np.sin(2 * np.pi * np.cumsum(pitch) / RATE) + 0.02 * rng.standard_normal(t.size)
        path = folder / f"voice{i % 6}" / f"take{i}.wav"
        path.parent.mkdir(exist_ok=True, parents=True)
        soundfile.write(path, wave, RATE)
    return folder
