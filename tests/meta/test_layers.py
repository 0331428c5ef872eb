"""The layers of the package: a module imports only from lower layers and from its own folder."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import mae_ast_fast

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mae_ast_fast"
LAYERS = {
    "kernels": 0,
    "files": 0,
    "devices": 0,
    "validate": 0,
    "ops": 1,
    "models": 2,
    "checkpoints": 3,
    "data": 3,
    "training": 4,
    "inference": 5,
    "downstream": 5,
    "integrations": 6,
    "tools": 6,
    "cli": 7,
}
# Public paths that only re-export, the package itself and its main module: above all layers, imported by no layer.
PUBLIC_PATHS = {"checkpoint", "ssast", "hf", "s3prl"}
TOP = {"__init__", "__main__", *PUBLIC_PATHS}
# Classmethods that read official checkpoints, and import the code for it when they are called.
EXCEPTIONS = {
    ("models.mae_ast", "from_fairseq_state_dict", "checkpoints"),
    ("models.ssast", "from_official", "checkpoints"),
}


@dataclass(frozen=True)
class Import:
    """``source`` imports ``target``: dotted names below the package.

    Attributes:
        function: Name of the function that contains the import, "" at the top of the module.
        names: Imported names.
    """

    source: str
    target: str
    function: str
    names: tuple[str, ...]


def modules() -> dict[str, Path]:
    """Dotted name below the package -> file."""
    paths = {}
    for prefix, folder in (("", PACKAGE), ("kernels.", ROOT / "kernels")):
        for path in sorted(folder.rglob("*.py")):
            name = ".".join(path.relative_to(folder).with_suffix("").parts)
            paths[prefix + name if name == "__init__" else prefix + name.removesuffix(".__init__")] = path
    return paths


MODULES = modules()


def targets(node: ast.Import | ast.ImportFrom, source: str, path: Path) -> list[str]:
    """Dotted names below the package of the modules that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[2] for alias in node.names if alias.name.split(".")[0] == "mae_ast_fast"]
    if node.level:
        parts = source.split(".") if path.name == "__init__.py" and source != "__init__" else source.split(".")[:-1]
        parts = parts[: len(parts) - node.level + 1] + (node.module or "").split(".") * bool(node.module)
    else:
        root, *parts = node.module.split(".")
        if root != "mae_ast_fast":
            return []
    base = ".".join(parts)
    if not base:
        return [alias.name if alias.name in LAYERS else "" for alias in node.names]
    submodules = [f"{base}.{alias.name}" for alias in node.names]
    return [name if name in MODULES else base for name in submodules]


def imports_of(source: str, path: Path) -> Iterator[Import]:
    """Imports of the package's modules, also inside functions, but not those under TYPE_CHECKING."""

    def walk(node: ast.AST, function: str) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            if isinstance(child, (ast.Import, ast.ImportFrom)):
                names = tuple(alias.name for alias in child.names)
                yield from (Import(source, target, function, names) for target in targets(child, source, path))
            yield from walk(child, child.name if isinstance(child, ast.FunctionDef) else function)

    yield from walk(ast.parse(path.read_text()), "")


IMPORTS = [statement for name, path in MODULES.items() for statement in imports_of(name, path)]


def folder(module: str) -> str:
    return module.split(".", maxsplit=1)[0]


def test_every_module_has_a_layer() -> None:
    assert {folder(name) for name in MODULES} == {*LAYERS, *TOP}


def test_imports_go_to_lower_layers_or_same_folder() -> None:
    wrong, used = [], set()
    for statement in IMPORTS:
        source, target = folder(statement.source), folder(statement.target)
        if source in TOP or source == target:
            continue
        if target in ("", "__init__") and statement.names == ("__version__",):
            continue
        if LAYERS.get(target, 99) < LAYERS[source]:
            continue
        exception = statement.source, statement.function, target
        used.add(exception)
        if exception not in EXCEPTIONS:
            wrong.append(
                f"{statement.source} imports {statement.target}"
                + f" in {statement.function}()" * bool(statement.function)
            )
    assert not wrong, "\n".join(wrong)
    assert used == EXCEPTIONS, f"unused exceptions: {EXCEPTIONS - used}"


def test_public_paths_only_re_export() -> None:
    for name in sorted(PUBLIC_PATHS):
        _, *statements = ast.parse(MODULES[name].read_text()).body  # the first is the docstring
        *imports, exported = statements
        assert imports and all(isinstance(node, ast.ImportFrom) for node in imports), name
        assert isinstance(exported, ast.Assign) and exported.targets[0].id == "__all__", name


def test_public_paths_are_imported_only_by_package() -> None:
    importers = {statement.source for statement in IMPORTS if folder(statement.target) in PUBLIC_PATHS}
    assert importers == {"__init__"}, "the package must import them, so that they are its attributes"


def test_module_imports_have_no_cycle() -> None:
    """Only imports at the top of a module: those inside functions may close a cycle within a folder."""
    edges: dict[str, set[str]] = {name: set() for name in MODULES}
    for statement in IMPORTS:
        if not statement.function and statement.target in edges and statement.target != statement.source:
            edges[statement.source].add(statement.target)
    remaining = dict(edges)
    while independent := [name for name, dependencies in remaining.items() if not dependencies & remaining.keys()]:
        for name in independent:
            del remaining[name]
    assert not remaining, f"in a cycle, or depending on one: {sorted(remaining)}"


def test_checkpoint_modules_do_not_import_each_other() -> None:
    pair = {"checkpoints.load", "checkpoints.training"}
    assert not [statement for statement in IMPORTS if {statement.source, statement.target} == pair]


def test_package_file_count_and_length_within_limits() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 12
    sizes = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert not {name: size for name, size in sizes.items() if size > 600}


@pytest.mark.parametrize("name", mae_ast_fast.__all__)
def test_package_exports_listed_names(name: str) -> None:
    assert callable(getattr(mae_ast_fast, name))


def test_public_paths_export_same_objects() -> None:
    import mae_ast_fast.checkpoint
    import mae_ast_fast.ops
    import mae_ast_fast.s3prl
    import mae_ast_fast.ssast

    assert mae_ast_fast.checkpoint.load_fairseq is mae_ast_fast.load_fairseq
    assert mae_ast_fast.ssast.SSAST is mae_ast_fast.SSAST
    assert mae_ast_fast.s3prl.Upstream.__module__ == "mae_ast_fast.integrations.s3prl"
    for name in ("add_layer_norm", "bias_gelu", "gather_patches", "scatter_tokens", "masked_mse", "info_nce"):
        assert callable(getattr(mae_ast_fast.ops, name))
