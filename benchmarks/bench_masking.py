"""Drawing masks: every strategy, the paper's loops against tensors without loops, over batch sizes and clip lengths.

OMP_WAIT_POLICY=PASSIVE python -m pytest benchmarks -k masking --benchmark-json=benchmarks/results/masking_cpu.json
python -m pytest benchmarks -k masking --benchmark-disable          every column once, at toy sizes

    original    benchmarks/baselines/original.py: for random a loop over the clips; for chunk and chunk_official a loop
                over the
                squares, which draws ONE mask for the whole batch, as the paper does. Runs on the host, as the paper's
                does; the copy to a GPU counts. The paper's code has no other strategy in a style of its own.
    original, once a clip
                of chunk, which gives every clip a mask of its own: that loop for each clip. The paper does not do it.
    torch       ops.sample_mask(impl="torch"), on the device
    triton      ops.sample_mask(impl="triton") (GPU; random and chunk)

Base point: chunk, 64 clips of 10 s. Ratio and grid are the presets': patch_base for random, chunk, time and frequency
(512 tokens or so a clip), frame_base for span.

Before anything is timed: every mask hides exactly as many tokens as it should and none past a clip's end, also with
clips of unequal length; a clip's mask does not depend on its batch; triton's is torch's to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from baselines.original import chunk_mask, random_mask
from measure import DEVICE, ON_GPU, ROUNDS, Turns, load_average
from torch import Tensor

from mae_ast_fast import MAEASTConfig, ops
from mae_ast_fast.ops.masking import num_visible


@dataclass(frozen=True)
class Point:
    """What is drawn; ``name`` says what differs from the base point."""

    name: str = "base point"
    strategy: str = "chunk"
    clips: int = 64
    seconds: float = 10.0

    @property
    def config(self) -> MAEASTConfig:
        return MAEASTConfig.preset("frame_base" if self.strategy == "span" else "patch_base")

    @property
    def tokens(self) -> int:
        return (int(100 * self.seconds) - 2) // self.config.patch_size[0] * self.config.grid_f


STRATEGIES = ("random", "chunk_official", "span", "time", "frequency")
POINTS = (
    Point(),
    *(Point(strategy, strategy) for strategy in STRATEGIES),
    *(Point(f"{clips} clips", clips=clips) for clips in (8, 256)),
    *(Point(f"clips of {seconds:g} s", seconds=seconds) for seconds in (2.0, 30.0)),
)


def columns(point: Point) -> dict[str, Callable[[], Tensor]]:
    """Functions that draw a batch's masks (B, L)."""
    clips, tokens, grid_f, ratio = point.clips, point.tokens, point.config.grid_f, point.config.mask_ratio
    found: dict[str, Callable[[], Tensor]] = {}
    if point.strategy == "random":
        found["original"] = lambda: random_mask(clips, tokens, ratio).to(DEVICE)
    elif point.strategy == "chunk_official":
        found["original"] = lambda: chunk_mask(clips, tokens, grid_f, ratio).to(DEVICE)
    elif point.strategy == "chunk":
        each = partial(chunk_mask, 1, tokens, grid_f, ratio)
        found["original, once a clip"] = lambda: torch.cat([each() for _ in range(clips)]).to(DEVICE)
    counts = torch.full((clips,), tokens, device=DEVICE)
    seed = torch.randint(2**62, (), device=DEVICE)
    for impl in ("torch", "triton") if ON_GPU and point.strategy in ops.MASK_KERNEL_STRATEGIES else ("torch",):
        found[impl] = partial(draw, point, counts, seed, impl)
    return found


def draw(point: Point, counts: Tensor, seed: Tensor, impl: str, clip_ids: Tensor | None = None) -> Tensor:
    """Masks of clips of these token counts by the library; nothing is read back from a GPU."""
    how: dict[str, Any] = {"seed": seed, "clip_ids": clip_ids, "max_tokens": point.tokens, "impl": impl}
    return ops.sample_mask(point.strategy, counts, point.config.grid_f, point.config.mask_ratio, **how)


def check_mask(mask: Tensor, counts: Tensor, point: Point) -> None:
    """Raises AssertionError where a clip hides too many or too few tokens, or one that it does not have."""
    assert mask.dtype == torch.bool and mask.shape == (len(counts), point.tokens)
    expected = counts - num_visible(counts, point.config.mask_ratio)
    assert torch.equal(mask.sum(1), expected), f"{point.strategy}: hidden tokens differ from what was asked for"
    past = torch.arange(point.tokens, device=mask.device) >= counts[:, None]
    assert not (mask & past).any(), f"{point.strategy}: tokens past a clip's end are hidden"


def check(point: Point, drawn: dict[str, Callable[[], Tensor]]) -> None:
    """Raises AssertionError where a column draws what the strategy does not allow."""
    full = torch.full((point.clips,), point.tokens, device=DEVICE)
    for column in drawn.values():
        mask = column()
        assert mask.device.type == DEVICE.type
        check_mask(mask, full, point)
    grid_f = point.config.grid_f
    blocks = torch.linspace(1, point.tokens // grid_f, point.clips, device=DEVICE).long()
    seed = torch.tensor(7, device=DEVICE)
    mixed = draw(point, blocks * grid_f, seed, "torch")
    check_mask(mixed, blocks * grid_f, point)
    half = torch.arange(0, point.clips, 2, device=DEVICE)
    again = draw(point, blocks[half] * grid_f, seed, "torch", clip_ids=half)
    assert torch.equal(again, mixed[half]), f"{point.strategy}: a mask depends on the batch"
    if "triton" in drawn:
        same = torch.equal(draw(point, blocks * grid_f, seed, "triton"), mixed)
        assert same and torch.equal(drawn["triton"](), drawn["torch"]()), f"{point.strategy}: triton differs from torch"


def pytest_generate_tests(metafunc: Any) -> None:
    metafunc.parametrize("point", POINTS, ids=lambda point: point.name)


@pytest.mark.timeout(300)
def bench_masking(point: Point, benchmark: Any) -> None:
    if benchmark.disabled:
        point = replace(point, clips=3, seconds=1.0)
    with load_average(benchmark.extra_info):
        drawn = columns(point)
        check(point, drawn)
        turns = Turns(drawn, wall=True, once=benchmark.disabled)
        benchmark.pedantic(turns, rounds=ROUNDS)
    benchmark.extra_info |= {"point": point.name, "strategy": point.strategy, "clips": point.clips}
    benchmark.extra_info |= {"tokens": point.tokens, "columns": turns.samples}
