"""Launch table: the launch configuration of each kernel. Reviewed like code; nothing is tuned at run time.

A row is (architecture, maximum row width in elements, maximum element size in bytes, configuration). The first row that
fits is used. A kernel's file declares the default rows with ``launches``. ``mae-ast-fast tune`` measures on a GPU and
writes kernels/configs/ARCHITECTURE.json, whose rows go before the defaults. An architecture without a file has the
defaults. The files also hold the speed of products with an epilogue; an epilogue is used only where it was fast enough.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

KERNELS = Path(__file__).parent.parent
TUNED = KERNELS / "configs"
Tuned = dict[str, dict[str, list[dict[str, Any]]]]  # content of a file: section -> kernel -> rows

Row = tuple[str, int, int, dict[str, int]]
TABLE: dict[str, list[Row]] = {}  # kernel -> rows, for the kernel files imported so far


def launches(kernel: str, *rows: Row) -> None:
    """Declare the default launches of a kernel; called once, next to the kernel.

    Args:
        kernel: Name of its file, with "_forward" or "_backward" where the directions have different launches.
        *rows: Rows of the table.

    Raises:
        ValueError: A tuned architecture's file does not fit the kernel.
    """
    TABLE[kernel] = list(rows)
    insert_launches(TUNED, kernel)


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
        and ``EPILOGUES`` mean, in this order. The launches' own fields are checked for kernels in ``TABLE``.

    Raises:
        ValueError: The file is damaged, or does not fit these kernels.
    """
    if not path.is_file():
        return {"launches": {}, "epilogues": {}}
    try:
        tuned: Tuned = json.loads(path.read_text(encoding="utf-8"))
        _check_fields(tuned, launches=dict, epilogues=dict)
        for kernel, row in _rows(tuned["launches"], _has_file):
            _check_fields(row, max_width=int, max_element_size=int, launch=dict)
            if kernel in TABLE:
                parameters = TABLE[kernel][-1][3]  # each row of a kernel has the same
                _check_fields(row["launch"], **dict.fromkeys(parameters, int))
        for _, row in _rows(tuned["epilogues"], EPILOGUES.__contains__):
            sizes = {"inner": int, "outputs": int, "element_size": int}
            _check_fields(row, **sizes, product_ratio=float, product_and_kernel_ratio=float)
    except ValueError as error:
        raise ValueError(
            f"{path}: expected JSON as mae-ast-fast tune writes it: {error}. Restore the file, or delete it to use the "
            "default launches"
        ) from error
    return tuned


def _has_file(kernel: str) -> bool:
    return (KERNELS / f"{kernel.removesuffix('_forward').removesuffix('_backward')}.py").is_file()


def _rows(section: dict[str, Any], is_kernel: Callable[[str], bool]) -> Iterator[tuple[str, Any]]:
    """Yield (kernel, row) of a section.

    Raises:
        ValueError: Another kernel, or its rows are no list.
    """
    for kernel, rows in section.items():
        if not is_kernel(kernel) or not isinstance(rows, list):
            raise ValueError(f"expected lists of rows by kernel, got {rows!r} for {kernel!r}")
        yield from ((kernel, row) for row in rows)


def _check_fields(found: Any, **expected: type) -> None:
    """Raise a ``ValueError`` unless a JSON object has exactly these fields, of these types."""
    if not isinstance(found, dict) or {name: type(value) for name, value in found.items()} != expected:
        fields = ", ".join(f"{name} ({kind.__name__})" for name, kind in expected.items())
        raise ValueError(f"expected an object with {fields}, got {found!r}")


def _read_folder(folder: Path) -> Iterator[tuple[str, Tuned]]:
    """Yield (architecture, content) of each file."""
    for path in sorted(folder.glob("[!.]*.json")):  # a killed write may leave a hidden file
        yield path.stem, read_tuned(path)


def insert_launches(folder: Path, kernel: str) -> None:
    """Insert a kernel's rows of all tuned architectures into ``TABLE``, before the defaults.

    Raises:
        ValueError: A file is damaged.
    """
    for arch, tuned in _read_folder(folder):
        rows = tuned["launches"].get(kernel, [])
        TABLE[kernel][:0] = [(arch, row["max_width"], row["max_element_size"], row["launch"]) for row in rows]


def insert_epilogues(folder: Path) -> None:
    """Insert the rows of all tuned architectures into ``EPILOGUES``.

    Raises:
        ValueError: A file is damaged.
    """
    for arch, tuned in _read_folder(folder):
        for kernel, rows in tuned["epilogues"].items():
            for row in rows:
                sizes = arch, row["inner"], row["outputs"], row["element_size"]
                EPILOGUES[kernel].append((*sizes, row["product_ratio"], row["product_and_kernel_ratio"]))


insert_epilogues(TUNED)


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
