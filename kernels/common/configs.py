"""Launch table: what each kernel is launched with. Constants, reviewed like code; nothing is tuned at run time.

A row is (architecture, widest row it takes, largest element in bytes, launch); the first that fits counts.
``mae-ast-fast tune`` measures on a GPU and puts rows of that architecture before the rows for "any". ``EPILOGUES``
holds what it measured of products with an epilogue, which are used where that speaks for them.
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
    # BM x BN: a tile of outputs, BK values of the product at a time; the epilogue takes BS columns of it at once;
    # PER_SM programs on each multiprocessor.
    "feed_forward_forward": [
        (
            "gfx942",
            1 << 30,
            2,
            {"BM": 128, "BN": 128, "BK": 64, "BS": 64, "PER_SM": 1, "num_warps": 8, "num_stages": 3},
        ),
        ("any", 1 << 30, 2, {"BM": 128, "BN": 256, "BK": 64, "BS": 64, "PER_SM": 1, "num_warps": 8, "num_stages": 3}),
        ("any", 1 << 30, 4, {"BM": 64, "BN": 64, "BK": 16, "BS": 64, "PER_SM": 1, "num_warps": 8, "num_stages": 3}),
    ],
    "feed_forward_backward": [
        ("any", 1 << 30, 2, {"BM": 128, "BN": 128, "BK": 64, "BS": 64, "PER_SM": 1, "num_warps": 8, "num_stages": 3}),
        ("any", 1 << 30, 4, {"BM": 64, "BN": 64, "BK": 16, "BS": 64, "PER_SM": 1, "num_warps": 8, "num_stages": 3}),
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

LEAST = 0.9  # of the speed of cuBLAS's bare product, from which an epilogue is on

# Measured by ``mae-ast-fast tune --op feed_forward``: (architecture, K, outputs, bytes an element, how many times as
# fast as the bare product, how many times as fast as product and bias_gelu one after the other).
EPILOGUES: dict[str, list[tuple[str, int, int, int, float, float]]] = {
    "feed_forward_forward": [
        # GELU on x W1^T
    ],
    "feed_forward_backward": [
        # its derivative on dy W2
    ],
}


def epilogue(kernel: str, arch: str, inner: int, outputs: int, size: int) -> tuple[bool, str]:
    """Whether a product with its epilogue takes the place of cuBLAS's and an elementwise kernel, and why, in words.

    Only what was measured is on: at least ``LEAST`` of the bare product's speed, and faster than the two together.

    Args:
        kernel: Name in ``EPILOGUES``.
        arch: Architecture, "sm_90".
        inner: K, what the product sums over.
        outputs: Columns of the result.
        size: Bytes an element.
    """
    for *key, bare, both in EPILOGUES[kernel]:
        if key == [arch, inner, outputs, size]:
            return bare >= LEAST and both > 1.0, f"{bare:.2f} x the bare product, {both:.2f} x product and bias_gelu"
    return False, f"not measured on {arch}"


def epilogues(arch: str) -> tuple[str, str]:
    """What impl="triton" does on an architecture: "on" where any epilogue is, or "off", and all measurements."""
    found = []
    for kernel, rows in EPILOGUES.items():
        for *key, _, _ in rows:
            if key[0] == arch:
                on, why = epilogue(kernel, *key)
                size = "x".join(str(number) for number in key[1:3])
                found.append((on, f"{kernel} {size}, {key[3]} bytes, {'on' if on else 'off'}: {why}"))
    choice = "on" if any(on for on, _ in found) else "off"
    return choice, "; ".join(text for _, text in found) or f"GELU inside products is not measured on {arch}"
