"""Launch table: what each kernel is launched with. Constants, reviewed like code; nothing is tuned at run time.

A row is (architecture, widest row it takes, largest element in bytes, launch); the first that fits counts.
``mae-ast-fast tune`` measures on a GPU and puts rows of that architecture before the rows for "any".
"""

from __future__ import annotations

TABLE: dict[str, list[tuple[str, int, int, dict[str, int]]]] = {
    # ROWS: rows of a program's tile. One warp a row.
    "add_layer_norm_forward": [
        ("any", 1024, 4, {"ROWS": 4, "num_warps": 4}),
        ("any", 4096, 4, {"ROWS": 1, "num_warps": 4}),
        ("any", 16384, 4, {"ROWS": 1, "num_warps": 16}),
    ],
    # PROGRAMS: at most so many programs share the rows, each with partial sums of its own.
    "add_layer_norm_backward": [
        ("any", 1024, 4, {"PROGRAMS": 1056, "num_warps": 4}),
        ("any", 4096, 4, {"PROGRAMS": 528, "num_warps": 8}),
        ("any", 16384, 4, {"PROGRAMS": 264, "num_warps": 16}),
    ],
}
