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
    # ROWS x COLUMNS: a program's tile; in the backward PROGRAMS at most share the rows of a column block.
    "bias_gelu_forward": [
        ("any", 1 << 30, 4, {"ROWS": 4, "COLUMNS": 512, "num_warps": 4}),
    ],
    "bias_gelu_backward": [
        ("any", 1 << 30, 4, {"ROWS": 4, "COLUMNS": 256, "PROGRAMS": 352, "num_warps": 4}),
    ],
    "scatter_tokens_forward": [
        ("any", 1024, 4, {"ROWS": 4, "num_warps": 4}),
        ("any", 4096, 4, {"ROWS": 1, "num_warps": 4}),
        ("any", 16384, 4, {"ROWS": 1, "num_warps": 16}),
    ],
    "scatter_tokens_backward": [
        ("any", 1024, 4, {"PROGRAMS": 1056, "num_warps": 4}),
        ("any", 4096, 4, {"PROGRAMS": 528, "num_warps": 8}),
        ("any", 16384, 4, {"PROGRAMS": 264, "num_warps": 16}),
    ],
    # BLOCK_M: queries of a step; a program holds all keys of a clip and head.
    "short_attention_forward": [
        ("any", 128, 2, {"BLOCK_M": 32, "num_warps": 8, "num_stages": 1}),
        ("any", 128, 4, {"BLOCK_M": 16, "num_warps": 8, "num_stages": 1}),
    ],
    "short_attention_backward": [
        ("sm_100", 128, 2, {"BLOCK_M": 32, "num_warps": 8, "num_stages": 2}),
        ("any", 128, 2, {"BLOCK_M": 32, "num_warps": 8, "num_stages": 1}),
        ("any", 128, 4, {"BLOCK_M": 16, "num_warps": 8, "num_stages": 1}),
    ],
    # ROWS: patches of a program's tile; the width is P.
    "gather_patches": [
        ("any", 512, 4, {"ROWS": 4, "num_warps": 4}),
        ("any", 4096, 4, {"ROWS": 1, "num_warps": 8}),
        ("any", 16384, 4, {"ROWS": 1, "num_warps": 16}),
    ],
    # BLOCK_L: tokens of a clip, all in one program; the width is the longest clip's tokens.
    "sample_mask": [
        ("any", 512, 8, {"BLOCK_L": 512, "num_warps": 4}),
        ("any", 1024, 8, {"BLOCK_L": 1024, "num_warps": 8}),
        ("any", 4096, 8, {"BLOCK_L": 4096, "num_warps": 16}),
        ("any", 8192, 8, {"BLOCK_L": 8192, "num_warps": 16}),
    ],
    # ROWS: rows of a program's tile, forward and backward. One warp a row.
    "masked_mse": [
        ("any", 1024, 4, {"ROWS": 4, "num_warps": 4}),
        ("any", 4096, 4, {"ROWS": 1, "num_warps": 4}),
        ("any", 16384, 4, {"ROWS": 1, "num_warps": 16}),
    ],
    # BM rows of a program, swept in tiles of BN. In fp32 forward and backward share it, so that their products agree.
    "info_nce_forward": [
        ("any", 256, 2, {"BM": 64, "BN": 64, "num_warps": 8, "num_stages": 2}),
        ("any", 512, 4, {"BM": 16, "BN": 32, "num_warps": 8, "num_stages": 2}),
    ],
    "info_nce_backward": [
        ("any", 256, 2, {"BM": 32, "BN": 64, "num_warps": 8, "num_stages": 2}),
        ("any", 512, 4, {"BM": 16, "BN": 32, "num_warps": 8, "num_stages": 1}),
    ],
}
