"""Register spills that stay, each with a reason: ``mae-ast-fast kernels`` fails on every other one.

An entry allows one variant on one architecture up to ``bytes`` (stored and loaded by a thread, as the report shows).
An entry whose spill is gone fails too, so that the list cannot rot.
"""

from __future__ import annotations

from typing import NamedTuple


class Allowed(NamedTuple):
    """As the report names them: "op._kernel", the variant, the architecture."""

    kernel: str
    variant: str
    arch: str
    bytes: int
    reason: str


ALLOWED: tuple[Allowed, ...] = ()
