"""Output of a run while it trains, by its first process alone: metrics.jsonl, TensorBoard and the progress display."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import atomic_write


@dataclass
class StepRecord:
    """An update: its line in metrics.jsonl, in this order.

    Attributes:
        step: Number of the update, from 1.
        epoch: Epoch of the first process's first stream.
        lr: Learning rate.
        clips: Clips of all processes, as are the other counts.
        waited: Seconds spent waiting for data, mean over the processes.
        faults: Clips that could not be read.
        tokens: Real tokens.
        rows: Rows computed, padding included.
        audio_seconds: Audio of the clips, in seconds.
        loss: As in ``StepMetrics``, like the following ones.
        loss_reconstruction: Mean squared error.
        loss_classification: InfoNCE.
        accuracy: Share of masked tokens that InfoNCE identifies, in [0, 1].
        grad_norm: Before clipping. Not finite if the update was skipped; null in the file.
    """

    step: int
    epoch: int
    lr: float
    clips: int
    waited: float
    faults: int
    tokens: int
    rows: int
    audio_seconds: float
    loss: float
    loss_reconstruction: float
    loss_classification: float
    accuracy: float
    grad_norm: float

    def to_json(self) -> dict[str, Any]:
        """The fields of the line."""
        return dataclasses.asdict(self) | {"grad_norm": self.grad_norm if math.isfinite(self.grad_norm) else None}


class MetricsLog:
    """Metrics of one run: of pretraining, or of a fold of fine-tuning.

    Args:
        run: Run folder.
        step: Updates already done.
        steps: Updates of the whole run or fold.
        rows: Rows that stay in metrics.jsonl. None: those of the updates up to ``step``, without those that a stopped
            run wrote later.
        curves: Folder of the TensorBoard events, relative to the run folder.
        purge_from: Position on the curves from which a stopped run's points are dropped. None: ``step``.
    """

    def __init__(
        self,
        run: Path,
        step: int,
        steps: int,
        *,
        rows: list[dict[str, Any]] | None = None,
        curves: str = "tensorboard",
        purge_from: int | None = None,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        self.path, self.steps = run / "metrics.jsonl", steps
        if rows is None:
            rows = [row for row in read_metrics(self.path) if row["step"] <= step] if self.path.is_file() else []
        text = "".join(json.dumps(row) + "\n" for row in rows)
        atomic_write(self.path, lambda temp: temp.write_text(text))
        self._events = SummaryWriter(run / curves, purge_step=step if purge_from is None else purge_from)
        self._bar = tqdm(total=steps, initial=step, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)

    def advance(self) -> None:
        """Advance the progress bar by one update."""
        self._bar.update()

    def write(self, row: dict[str, Any]) -> None:
        """Append a row of pretraining, with its floats as points of curves, and print an evaluation.

        Args:
            row: ``step`` and either metrics of an update or a ``held_out`` report.

        Raises:
            OSError: A file cannot be written, for example because the disk is full.
        """
        values = row if "held_out" not in row else _flat("held_out", row["held_out"])
        self.append(row, {name: x for name, x in values.items() if isinstance(x, float)}, row["step"])
        if "held_out" in row:
            report = row["held_out"]
            baselines = ", ".join(f"{name} {value:.3f}" for name, value in report["baselines"].items())
            self.say(
                f"step {row['step']}: held out mse {report['reconstruction_mse']:.3f} ({baselines}), "
                f"accuracy {report['accuracy']:.3f} (chance {report['chance']:.3f}), "
                f"effective rank {report['effective_rank']:.1f}"
            )
            for warning in report["warnings"]:
                self.say(f"step {row['step']}: {warning}")

    def append(self, row: dict[str, Any], points: dict[str, float], position: int) -> None:
        """Append a line to metrics.jsonl, and points to the curves of TensorBoard.

        Args:
            row: Content of the line.
            points: Name of each curve -> value.
            position: Position of the points on the curves: the update or the epoch.

        Raises:
            OSError: A file cannot be written, for example because the disk is full.
        """
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
            for name, value in points.items():
                self._events.add_scalar(name, value, position)
        except OSError as error:  # a failed write does not name its file
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def say(self, line: str) -> None:
        """Print a line to stdout, above the progress bar if there is one."""
        self._bar.write(line, file=sys.stdout)
        sys.stdout.flush()

    def progress(self, step: int, line: str, seconds_left: float) -> None:
        """Show the progress, next to the progress bar or as a line of its own.

        Args:
            step: Updates done.
            line: Text to show.
            seconds_left: Estimated seconds until the last update.
        """
        if self._bar.disable:
            minutes, seconds = divmod(round(seconds_left), 60)
            print(f"step {step}/{self.steps}  {line}  ETA {minutes}:{seconds:02d}", flush=True)
        else:
            self._bar.set_postfix_str(line)

    def close(self) -> None:
        """Flush TensorBoard. A failure is only printed: it neither ends the run nor replaces another error."""
        self._bar.close()
        try:
            self._events.close()
        except OSError as error:
            print(f"the curves in {self._events.log_dir} are not complete: {error}", file=sys.stderr)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of pretraining's metrics.jsonl, each with its ``step``, without invalid lines."""
    return [row for row in read_rows(path) if isinstance(row.get("step"), int)]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl file without invalid lines, such as a last line that a killed process left incomplete."""
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows


def _flat(prefix: str, report: dict[str, Any]) -> dict[str, Any]:
    flat = {f"{prefix}/{name}": value for name, value in report.items() if name != "baselines"}
    return flat | {f"{prefix}/baseline_{name}": value for name, value in report["baselines"].items()}
