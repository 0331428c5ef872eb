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
        inside: Name of the function around the import, "" at the top of the module.
        names: What is imported.
    """

    source: str
    target: str
    inside: str
    names: tuple[str, ...]


def modules() -> dict[str, Path]:
    """Dotted name below the package -> file."""
    found = {}
    for prefix, folder in (("", PACKAGE), ("kernels.", ROOT / "kernels")):
        for path in sorted(folder.rglob("*.py")):
            name = ".".join(path.relative_to(folder).with_suffix("").parts)
            found[prefix + name if name == "__init__" else prefix + name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def targets(node: ast.Import | ast.ImportFrom, source: str, path: Path) -> list[str]:
    """Dotted names below the package of the modules that a statement imports."""
    if isinstance(node, ast.Import):
        return [a.name.partition(".")[2] for a in node.names if a.name.split(".")[0] == "mae_ast_fast"]
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
    inner = [f"{base}.{alias.name}" for alias in node.names]
    return [name if name in MODULES else base for name in inner]


def imports_of(source: str, path: Path) -> Iterator[Import]:
    """Imports of the package's own modules, those in functions too; those for type checkers alone do not run."""

    def walk(node: ast.AST, inside: str) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            if isinstance(child, (ast.Import, ast.ImportFrom)):
                names = tuple(alias.name for alias in child.names)
                yield from (Import(source, target, inside, names) for target in targets(child, source, path))
            yield from walk(child, child.name if isinstance(child, ast.FunctionDef) else inside)

    yield from walk(ast.parse(path.read_text()), "")


IMPORTS = [found for name, path in MODULES.items() for found in imports_of(name, path)]


def folder(module: str) -> str:
    return module.split(".", maxsplit=1)[0]


def test_layers_every_module_has_one() -> None:
    assert {folder(name) for name in MODULES} == {*LAYERS, *TOP}


def test_imports_go_to_lower_layers_or_the_same_folder() -> None:
    wrong, used = [], set()
    for found in IMPORTS:
        source, target = folder(found.source), folder(found.target)
        if source in TOP or source == target:
            continue
        if target in ("", "__init__") and found.names == ("__version__",):
            continue
        if LAYERS.get(target, 99) < LAYERS[source]:
            continue
        exception = found.source, found.inside, target
        used.add(exception)
        if exception not in EXCEPTIONS:
            wrong.append(f"{found.source} imports {found.target}" + f" in {found.inside}()" * bool(found.inside))
    assert not wrong, "\n".join(wrong)
    assert used == EXCEPTIONS, f"exceptions that nothing needs: {EXCEPTIONS - used}"


def test_public_paths_only_re_export() -> None:
    for name in sorted(PUBLIC_PATHS):
        _, *statements = ast.parse(MODULES[name].read_text()).body  # the first is the docstring
        *imports, exported = statements
        assert imports and all(isinstance(node, ast.ImportFrom) for node in imports), name
        assert isinstance(exported, ast.Assign) and exported.targets[0].id == "__all__", name


def test_public_paths_are_imported_by_the_package_alone() -> None:
    importers = {found.source for found in IMPORTS if folder(found.target) in PUBLIC_PATHS}
    assert importers == {"__init__"}, "which makes them attributes of the package"


def test_modules_import_each_other_in_no_cycle() -> None:
    """Imports at the top alone: those inside functions may close a cycle within a folder."""
    edges: dict[str, set[str]] = {name: set() for name in MODULES}
    for found in IMPORTS:
        if not found.inside and found.target in edges and found.target != found.source:
            edges[found.source].add(found.target)
    remaining = dict(edges)
    while free := [name for name, needs in remaining.items() if not needs & remaining.keys()]:
        for name in free:
            del remaining[name]
    assert not remaining, f"in or behind a cycle: {sorted(remaining)}"


def test_loading_and_training_checkpoints_do_not_import_each_other() -> None:
    pair = {"checkpoints.load", "checkpoints.training"}
    assert not [found for found in IMPORTS if {found.source, found.target} == pair]


def test_package_has_at_most_12_files_and_none_over_600_lines() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 12
    sizes = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert not {name: size for name, size in sizes.items() if size > 600}


@pytest.mark.parametrize("name", mae_ast_fast.__all__)
def test_package_exports_what_it_lists(name: str) -> None:
    assert callable(getattr(mae_ast_fast, name))


def test_public_paths_give_the_same_objects() -> None:
    import mae_ast_fast.checkpoint
    import mae_ast_fast.ops
    import mae_ast_fast.s3prl
    import mae_ast_fast.ssast

    assert mae_ast_fast.checkpoint.load_fairseq is mae_ast_fast.load_fairseq
    assert mae_ast_fast.ssast.SSAST is mae_ast_fast.SSAST
    assert mae_ast_fast.s3prl.Upstream.__module__ == "mae_ast_fast.integrations.s3prl"
    for name in ("add_layer_norm", "bias_gelu", "gather_patches", "scatter_tokens", "masked_mse", "info_nce"):
        assert callable(getattr(mae_ast_fast.ops, name))
