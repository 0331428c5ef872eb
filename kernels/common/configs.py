"""Launch table: the launch configuration of each kernel. Reviewed like code; nothing is tuned at run time.

A row is (architecture, maximum row width in elements, maximum element size in bytes, configuration). The first row that
fits is used. The rows in this file are the defaults. ``mae-ast-fast tune`` measures on a GPU and writes
kernels/configs/ARCHITECTURE.json. When this module is imported, the rows of these files go before the defaults. An
architecture without a file has the defaults. The files also hold the speed of products with an epilogue; an epilogue
is used only where it was fast enough.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

TUNED = Path(__file__).parent.parent / "configs"
Tuned = dict[str, dict[str, list[dict[str, Any]]]]  # content of a file: section -> kernel -> rows

TABLE: dict[str, list[tuple[str, int, int, dict[str, int]]]] = {
    # ROWS: rows per tile of a program. One warp per row.
    "add_layer_norm_forward": [
        ("any", 1024, 4, {"ROWS": 4, "num_warps": 4}),
        ("any", 4096, 4, {"ROWS": 1, "num_warps": 4}),
        ("any", 16384, 4, {"ROWS": 1, "num_warps": 16}),
    ],
    # PROGRAMS: maximum number of programs. They share the rows, and each writes its own partial sums.
    "add_layer_norm_backward": [
        ("any", 1024, 4, {"PROGRAMS": 1056, "num_warps": 4}),
        ("any", 4096, 4, {"PROGRAMS": 528, "num_warps": 8}),
        ("any", 16384, 4, {"PROGRAMS": 264, "num_warps": 16}),
    ],
    # ROWS x COLUMNS: tile of a program. In the backward at most PROGRAMS programs share the rows of a column block.
    "bias_gelu_forward": [
        ("any", 1 << 30, 4, {"ROWS": 4, "COLUMNS": 512, "num_warps": 4}),
    ],
    "bias_gelu_backward": [
        ("any", 1 << 30, 4, {"ROWS": 4, "COLUMNS": 256, "PROGRAMS": 352, "num_warps": 4}),
    ],
    # BM x BN: tile of outputs. BK: values summed per step of the product. BS: columns per slice of the epilogue.
    # PER_SM: programs per multiprocessor.
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
    # BLOCK_M: queries per step. A program holds all keys of one clip and head.
    "short_attention_forward": [
        ("any", 128, 2, {"BLOCK_M": 32, "num_warps": 8, "num_stages": 1}),
        ("any", 128, 4, {"BLOCK_M": 16, "num_warps": 8, "num_stages": 1}),
    ],
    "short_attention_backward": [
        ("sm_100", 128, 2, {"BLOCK_M": 32, "num_warps": 8, "num_stages": 2}),
        ("any", 128, 2, {"BLOCK_M": 32, "num_warps": 8, "num_stages": 1}),
        ("any", 128, 4, {"BLOCK_M": 16, "num_warps": 8, "num_stages": 1}),
    ],
    # ROWS: patches per tile of a program. The row width is P.
    "gather_patches": [
        ("any", 512, 4, {"ROWS": 4, "num_warps": 4}),
        ("any", 4096, 4, {"ROWS": 1, "num_warps": 8}),
        ("any", 16384, 4, {"ROWS": 1, "num_warps": 16}),
    ],
    # BLOCK_L: tokens of a clip, all in one program. The row width is the number of tokens of the longest clip.
    "sample_mask": [
        ("any", 512, 8, {"BLOCK_L": 512, "num_warps": 4}),
        ("any", 1024, 8, {"BLOCK_L": 1024, "num_warps": 8}),
        ("any", 4096, 8, {"BLOCK_L": 4096, "num_warps": 16}),
        ("any", 8192, 8, {"BLOCK_L": 8192, "num_warps": 16}),
    ],
    # ROWS: rows per tile of a program, forward and backward. One warp per row.
    "masked_mse": [
        ("any", 1024, 4, {"ROWS": 4, "num_warps": 4}),
        ("any", 4096, 4, {"ROWS": 1, "num_warps": 4}),
        ("any", 16384, 4, {"ROWS": 1, "num_warps": 16}),
    ],
    # BM: rows per program. BN: rows per tile of the other operand. In fp32 forward and backward use the same tile, so
    # that their products agree.
    "info_nce_forward": [
        ("any", 256, 2, {"BM": 64, "BN": 64, "num_warps": 8, "num_stages": 2}),
        ("any", 512, 4, {"BM": 16, "BN": 32, "num_warps": 8, "num_stages": 2}),
    ],
    "info_nce_backward": [
        ("any", 256, 2, {"BM": 32, "BN": 64, "num_warps": 8, "num_stages": 2}),
        ("any", 512, 4, {"BM": 16, "BN": 32, "num_warps": 8, "num_stages": 1}),
    ],
}

MIN_EPILOGUE_SPEED = 0.9  # lowest speed of an enabled epilogue, relative to cuBLAS's product without epilogue

# Measured by ``mae-ast-fast tune --op feed_forward``: (architecture, K, outputs, bytes per element, speed relative to
# the bare product, speed relative to the product followed by bias_gelu).
EPILOGUES: dict[str, list[tuple[str, int, int, int, float, float]]] = {
    "feed_forward_forward": [],  # GELU on x W1^T
    "feed_forward_backward": [],  # the derivative of GELU on dy W2
}


def read_tuned(path: Path) -> Tuned:
    """Read the file of a tuned architecture.

    Args:
        path: JSON file, such as kernels/configs/sm_90.json.

    Returns:
        Two sections, each kernel -> rows, which are empty if there is no such file. A row of "launches" has
        ``max_width``, ``max_element_size`` and ``launch``; one of "epilogues" has ``inner``, ``outputs``,
        ``element_size``, ``product_ratio`` and ``product_and_kernel_ratio``. They mean what the columns of ``TABLE``
        and ``EPILOGUES`` mean, in this order.

    Raises:
        ValueError: The file is damaged, or does not fit these kernels.
    """
    if not path.is_file():
        return {"launches": {}, "epilogues": {}}
    try:
        tuned: Tuned = json.loads(path.read_text(encoding="utf-8"))
        _check_fields(tuned, launches=dict, epilogues=dict)
        for kernel, row in _rows(tuned["launches"], TABLE):
            _check_fields(row, max_width=int, max_element_size=int, launch=dict)
            parameters = TABLE[kernel][-1][3]  # each row of a kernel has the same
            _check_fields(row["launch"], **dict.fromkeys(parameters, int))
        for _, row in _rows(tuned["epilogues"], EPILOGUES):
            sizes = {"inner": int, "outputs": int, "element_size": int}
            _check_fields(row, **sizes, product_ratio=float, product_and_kernel_ratio=float)
    except ValueError as error:
        raise ValueError(
            f"{path}: expected JSON as mae-ast-fast tune writes it: {error}. Restore the file, or delete it to use the "
            "default launches"
        ) from error
    return tuned


def _rows(section: dict[str, Any], kernels: Container[str]) -> Iterator[tuple[str, Any]]:
    """Yield (kernel, row) of a section.

    Raises:
        ValueError: Another kernel, or its rows are no list.
    """
    for kernel, rows in section.items():
        if kernel not in kernels or not isinstance(rows, list):
            raise ValueError(f"expected lists of rows by kernel, got {rows!r} for {kernel!r}")
        yield from ((kernel, row) for row in rows)


def _check_fields(found: Any, **expected: type) -> None:
    """Raise a ``ValueError`` unless a JSON object has exactly these fields, of these types."""
    if not isinstance(found, dict) or {name: type(value) for name, value in found.items()} != expected:
        fields = ", ".join(f"{name} ({kind.__name__})" for name, kind in expected.items())
        raise ValueError(f"expected an object with {fields}, got {found!r}")


def insert_tuned(folder: Path) -> None:
    """Insert the rows of all tuned architectures into ``TABLE`` and ``EPILOGUES``, before the defaults.

    Raises:
        ValueError: A file is damaged.
    """
    for path in sorted(folder.glob("[!.]*.json")):  # a killed write may leave a hidden file
        arch, tuned = path.stem, read_tuned(path)
        for kernel, rows in tuned["launches"].items():
            launches = [(arch, row["max_width"], row["max_element_size"], row["launch"]) for row in rows]
            TABLE[kernel] = launches + TABLE[kernel]
        for kernel, rows in tuned["epilogues"].items():
            for row in rows:
                sizes = arch, row["inner"], row["outputs"], row["element_size"]
                EPILOGUES[kernel].append((*sizes, row["product_ratio"], row["product_and_kernel_ratio"]))


insert_tuned(TUNED)


def epilogue(kernel: str, arch: str, *, inner: int, outputs: int, element_size: int) -> tuple[bool, str]:
    """Decide whether a product with epilogue replaces cuBLAS's product and an elementwise kernel.

    An epilogue is enabled only where it was measured: at least ``MIN_EPILOGUE_SPEED`` of the speed of the bare product,
    and faster than the product followed by bias_gelu.

    Args:
        kernel: Name in ``EPILOGUES``.
        arch: Architecture, such as "sm_90".
        inner: K, the number of values that each output sums over.
        outputs: Columns of the result.
        element_size: Bytes per element.

    Returns:
        Whether the epilogue is enabled, and the reason in words.
    """
    key = (arch, inner, outputs, element_size)
    for *row_key, speed_of_bare, speed_of_both in EPILOGUES[kernel]:
        if tuple(row_key) == key:
            enabled = speed_of_bare >= MIN_EPILOGUE_SPEED and speed_of_both > 1.0
            return enabled, f"{speed_of_bare:.2f} x the bare product, {speed_of_both:.2f} x product and bias_gelu"
    return False, f"not measured on {arch}"


def epilogues(arch: str) -> tuple[str, str]:
    """Summarise the epilogues that impl="triton" uses on an architecture.

    Args:
        arch: Architecture, such as "sm_90".

    Returns:
        "on" if any epilogue is enabled there, otherwise "off", and all measurements in words.
    """
    choices = []
    for kernel, rows in EPILOGUES.items():
        for row_arch, inner, outputs, element_size, _, _ in rows:
            if row_arch == arch:
                enabled, reason = epilogue(kernel, arch, inner=inner, outputs=outputs, element_size=element_size)
                state = "on" if enabled else "off"
                choices.append((enabled, f"{kernel} {inner}x{outputs}, {element_size} bytes, {state}: {reason}"))
    choice = "on" if any(enabled for enabled, _ in choices) else "off"
    return choice, "; ".join(text for _, text in choices) or f"GELU inside products is not measured on {arch}"
