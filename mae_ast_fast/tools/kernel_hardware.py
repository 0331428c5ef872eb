"""GPU architectures, their limits, and the occupancy of a kernel."""

from __future__ import annotations

from typing import NamedTuple


class Arch(NamedTuple):
    """An architecture: Triton's names, and the limits that decide occupancy (NVIDIA's tuning guides, CDNA 3 ISA).

    The registers of a multiprocessor (AMD: compute unit) are divided into four equal quarters, each with its own warps.
    """

    backend: str
    name: str | int
    warp: int  # threads per warp
    block_shared: int  # bytes of shared memory that a block may use
    shared: int  # bytes of shared memory per multiprocessor
    shared_unit: int  # a block's shared memory is rounded up to a multiple of this many bytes
    shared_taken: int  # bytes of shared memory that the system reserves per block
    registers: int  # 32-bit registers per quarter
    register_unit: int  # a warp's registers are rounded up to a multiple of this
    warps: int  # most warps per multiprocessor
    blocks: int  # most blocks per multiprocessor
    required: bool  # a kernel that does not compile fails the command even if the architecture was not requested


ARCHS = {
    "sm_80": Arch("cuda", 80, 32, 163 << 10, 164 << 10, 128, 1024, 16384, 256, 64, 32, True),
    "sm_90": Arch("cuda", 90, 32, 227 << 10, 228 << 10, 128, 1024, 16384, 256, 64, 32, True),
    "sm_100": Arch("cuda", 100, 32, 227 << 10, 228 << 10, 128, 1024, 16384, 256, 64, 32, True),
    "gfx942": Arch("hip", "gfx942", 64, 64 << 10, 64 << 10, 512, 0, 512 * 64, 8 * 64, 32, 32, False),
}
TENSOR_MEMORY = 512  # columns of tensor memory on sm_100


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def occupancy(arch: str, *, registers: int, shared: int, warps: int, tensor_memory: int = 0) -> float:
    """Share of a multiprocessor's warp slots in use when it holds as many blocks as fit, 0 to 1.

    max_warps = min(warps of the architecture, 4 * (registers per quarter // registers per warp, rounded up)).
    blocks = min(blocks of the architecture, max_warps // warps, shared memory // shared memory per block, rounded up);
    on sm_100 also at most 512 // tensor memory columns per block. occupancy = blocks * warps / warps of the
    architecture.

    Args:
        arch: Name in ``ARCHS``.
        registers: Registers per thread.
        shared: Bytes of shared memory per block.
        warps: Warps per block.
        tensor_memory: Columns of tensor memory per block.
    """
    limits = ARCHS[arch]
    warp_registers = _round_up(registers * limits.warp, limits.register_unit)
    max_warps = min(limits.warps, 4 * (limits.registers // max(warp_registers, 1)))
    blocks = min(limits.blocks, max_warps // warps)
    if block_shared := _round_up(shared, limits.shared_unit) + limits.shared_taken:
        blocks = min(blocks, limits.shared // block_shared)
    if tensor_memory:
        blocks = min(blocks, TENSOR_MEMORY // tensor_memory)
    return blocks * warps / limits.warps
