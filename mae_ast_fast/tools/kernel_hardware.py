"""GPU architectures, their limits, and the occupancy that follows."""

from __future__ import annotations

from typing import NamedTuple


class Arch(NamedTuple):
    """An architecture: how Triton calls it, and the limits that decide occupancy (NVIDIA's tuning guides, CDNA 3 ISA).

    The registers of a multiprocessor (AMD: compute unit) lie in four equal parts, each with warps of its own.
    """

    backend: str
    name: str | int
    warp: int  # threads
    block_shared: int  # bytes of shared memory that a block may have
    shared: int  # bytes of a multiprocessor
    shared_unit: int  # a block's bytes are rounded up to this,
    shared_taken: int  # and the system takes so many more for itself
    registers: int  # 32-bit registers of a part
    register_unit: int  # a warp's registers are rounded up to this
    warps: int  # that a multiprocessor holds
    blocks: int
    required: bool  # a kernel that does not compile fails the command even where the architecture was not asked for


ARCHS = {
    "sm_80": Arch("cuda", 80, 32, 163 << 10, 164 << 10, 128, 1024, 16384, 256, 64, 32, True),
    "sm_90": Arch("cuda", 90, 32, 227 << 10, 228 << 10, 128, 1024, 16384, 256, 64, 32, True),
    "sm_100": Arch("cuda", 100, 32, 227 << 10, 228 << 10, 128, 1024, 16384, 256, 64, 32, True),
    "gfx942": Arch("hip", "gfx942", 64, 64 << 10, 64 << 10, 512, 0, 512 * 64, 8 * 64, 32, 32, False),
}
TENSOR_MEMORY = 512  # columns of sm_100's tensor memory


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def occupancy(arch: str, registers: int, shared: int, warps: int, tensor_memory: int = 0) -> float:
    """Share of a multiprocessor's warps that are at work when it holds as many blocks as fit.

    blocks = min(blocks of the architecture, warps that fit // warps, shared memory // that of a block rounded up),
    warps that fit = min(warps of the architecture, 4 * (registers of a part // registers of a warp rounded up)), and on
    sm_100 512 columns of tensor memory // those of a block; occupancy = blocks * warps / warps of the architecture.

    Args:
        arch: A name in ``ARCHS``.
        registers: Of a thread.
        shared: Bytes of a block.
        warps: Of a block.
        tensor_memory: Columns of a block.
    """
    limits = ARCHS[arch]
    of_warp = _round_up(registers * limits.warp, limits.register_unit)
    fit = min(limits.warps, 4 * (limits.registers // max(of_warp, 1)))
    blocks = min(limits.blocks, fit // warps)
    if of_block := _round_up(shared, limits.shared_unit) + limits.shared_taken:
        blocks = min(blocks, limits.shared // of_block)
    if tensor_memory:
        blocks = min(blocks, TENSOR_MEMORY // tensor_memory)
    return blocks * warps / limits.warps
