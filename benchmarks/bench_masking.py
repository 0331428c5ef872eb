"""Drawing masks: every strategy, the paper's loops against vectorised code, over batch sizes and clip lengths.

OMP_WAIT_POLICY=PASSIVE python -m pytest benchmarks -k masking --benchmark-json=benchmarks/results/masking_cpu.json
python -m pytest benchmarks -k masking --benchmark-disable          every column once, at toy sizes

    original    benchmarks/baselines/original.py. For random a loop over the clips; for chunk and chunk_official a loop
                over the squares, which draws ONE mask for the whole batch, as in the paper. Runs on the host, as in the
                paper; the copy to a GPU counts. The paper's code has no loop for the other strategies.
    original, once a clip
                for chunk: that loop once per clip, so every clip has its own mask. The paper does not do this.
    torch       ops.sample_mask(impl="torch"), on the device
    triton      ops.sample_mask(impl="triton") (GPU; random and chunk)

Base point: chunk, 64 clips of 10 s. Ratio and grid are the presets': patch_base for random, chunk, time and frequency
(about 512 tokens per clip), frame_base for span.

Checks before anything is timed: every mask hides exactly the expected number of tokens and none past a clip's end,
also with clips of unequal length; a clip's mask does not depend on its batch; triton and torch draw identical masks.
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
    """A batch of masks to draw; ``name`` states the difference from the base point."""

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
    """Column name -> function that draws the masks (B, L) of a batch."""
    clips, max_tokens, grid_f, ratio = point.clips, point.tokens, point.config.grid_f, point.config.mask_ratio
    draws: dict[str, Callable[[], Tensor]] = {}
    if point.strategy == "random":
        draws["original"] = lambda: random_mask(clips, max_tokens, ratio).to(DEVICE)
    elif point.strategy == "chunk_official":
        draws["original"] = lambda: chunk_mask(clips, max_tokens, grid_f, ratio).to(DEVICE)
    elif point.strategy == "chunk":
        draw_one = partial(chunk_mask, 1, max_tokens, grid_f, ratio)
        draws["original, once a clip"] = lambda: torch.cat([draw_one() for _ in range(clips)]).to(DEVICE)
    num_tokens = torch.full((clips,), max_tokens, device=DEVICE)
    seed = torch.randint(2**62, (), device=DEVICE)
    for impl in ("torch", "triton") if ON_GPU and point.strategy in ops.MASK_KERNEL_STRATEGIES else ("torch",):
        draws[impl] = partial(draw, point, num_tokens, seed, impl=impl)
    return draws


def draw(point: Point, num_tokens: Tensor, seed: Tensor, *, impl: str, clip_ids: Tensor | None = None) -> Tensor:
    """Masks (B, L) of clips with these token counts, drawn by the library without a wait for the GPU."""
    options: dict[str, Any] = {"seed": seed, "clip_ids": clip_ids, "max_tokens": point.tokens, "impl": impl}
    return ops.sample_mask(point.strategy, num_tokens, point.config.grid_f, point.config.mask_ratio, **options)


def check_mask(mask: Tensor, num_tokens: Tensor, point: Point) -> None:
    """Raise AssertionError if a clip hides a wrong number of tokens, or tokens past its end."""
    assert mask.dtype == torch.bool and mask.shape == (len(num_tokens), point.tokens)
    expected = num_tokens - num_visible(num_tokens, point.config.mask_ratio)
    assert torch.equal(mask.sum(1), expected), f"{point.strategy}: a wrong number of tokens is hidden"
    past_end = torch.arange(point.tokens, device=mask.device) >= num_tokens[:, None]
    assert not (mask & past_end).any(), f"{point.strategy}: tokens past a clip's end are hidden"


def check(point: Point, draws: dict[str, Callable[[], Tensor]]) -> None:
    """Raise AssertionError if a column draws invalid masks."""
    full_clips = torch.full((point.clips,), point.tokens, device=DEVICE)
    for column in draws.values():
        mask = column()
        assert mask.device.type == DEVICE.type
        check_mask(mask, full_clips, point)
    grid_f = point.config.grid_f
    blocks = torch.linspace(1, point.tokens // grid_f, point.clips, device=DEVICE).long()
    seed = torch.tensor(7, device=DEVICE)
    mixed = draw(point, blocks * grid_f, seed, impl="torch")
    check_mask(mixed, blocks * grid_f, point)
    half_ids = torch.arange(0, point.clips, 2, device=DEVICE)
    half_masks = draw(point, blocks[half_ids] * grid_f, seed, impl="torch", clip_ids=half_ids)
    assert torch.equal(half_masks, mixed[half_ids]), f"{point.strategy}: a mask depends on the batch"
    if "triton" in draws:
        equal = torch.equal(draw(point, blocks * grid_f, seed, impl="triton"), mixed)
        assert equal and torch.equal(draws["triton"](), draws["torch"]()), (
            f"{point.strategy}: triton differs from torch"
        )


def pytest_generate_tests(metafunc: Any) -> None:
    metafunc.parametrize("point", POINTS, ids=lambda point: point.name)


@pytest.mark.timeout(300)
def bench_masking(point: Point, benchmark: Any) -> None:
    if benchmark.disabled:
        point = replace(point, clips=3, seconds=1.0)
    with load_average(benchmark.extra_info):
        draws = columns(point)
        check(point, draws)
        turns = Turns(draws, host_clock=True, single=benchmark.disabled)
        benchmark.pedantic(turns, rounds=ROUNDS)
    benchmark.extra_info |= {"point": point.name, "strategy": point.strategy, "clips": point.clips}
    benchmark.extra_info |= {"tokens": point.tokens, "columns": turns.samples}
