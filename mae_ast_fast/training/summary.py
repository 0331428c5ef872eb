"""The outcome of a finished pretraining run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class PretrainSummary:
    """The content of summary.json.

    Attributes:
        steps: Updates of the run.
        model: Type of the model, as in its config.json.
        config: Configuration of the model.
        parameters: Number of the model's parameters.
        device: Device of the first process.
        processes: Number of processes.
        parallel: "ddp" or "fsdp"; None with one process.
        micro_batches: Micro-batches per update, over all processes.
        precision: "fp32", "bf16" or "fp16".
        threads: CPU threads per process.
        train_seconds: Seconds of the updates, without checkpoints and evaluations.
        audio_hours_seen: Hours of audio in all updates.
        clips_per_second: Mean over ``train_seconds``.
        tokens_per_second: Mean over ``train_seconds``.
        padding_share: Share of the computed rows that are padding, in [0, 1].
        data_wait_share: Share of ``train_seconds`` spent waiting for data, mean over the processes.
        final_loss: Loss of the last update; None without updates.
        held_out: Result of ``evaluate`` on the held-out clips.
        held_out_by_kind: The same for the clips of each kind, by kind.
        held_out_split: Sentence that describes the split.
        held_out_clips: Names of the held-out clips.
        train_clips: Number of clips to train on; None if no report counts them.
        data: Numbers of files, clips, hours and findings (None or 0 if no report counts them), and the names of what
            could not be read.
        torch: Version of PyTorch.
    """

    steps: int
    model: str
    config: dict[str, Any]
    parameters: int
    device: str
    processes: int
    parallel: str | None
    micro_batches: int
    precision: str
    threads: int
    train_seconds: float
    audio_hours_seen: float
    clips_per_second: float
    tokens_per_second: float
    padding_share: float
    data_wait_share: float
    final_loss: float | None
    held_out: dict[str, Any]
    held_out_by_kind: dict[str, dict[str, Any]]
    held_out_split: str
    held_out_clips: list[str]
    train_clips: int | None
    data: dict[str, Any]
    torch: str
