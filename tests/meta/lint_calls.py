"""Lint: a call to one of the project's functions passes no packed positional arguments (``f(*values)``).

A reader cannot see which argument a packed value becomes. Three forms are allowed: a wrapper that passes on its own
``*args``, a function that takes any number of equal arguments (``def f(*values)``), and ``Class._make(values)`` of
named tuples.

    python tests/meta/lint_calls.py [FOLDER ...]
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("mae_ast_fast", "kernels", "benchmarks", "tests")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def defined_names(trees: list[ast.Module]) -> set[str]:
    """Names of the files' classes and of their functions without ``*args``, and how classes call themselves."""
    names = {"cls", "self"}
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.ClassDef) or (isinstance(node, FUNCTIONS) and not node.args.vararg):
            names.add(node.name)
    return names


def variadic_names(tree: ast.Module) -> set[str]:
    """Names of a file's own functions with ``*args``: there, a bare name means these."""
    return {node.name for node in ast.walk(tree) if isinstance(node, FUNCTIONS) and node.args.vararg}


def library_names(tree: ast.Module) -> set[str]:
    """Names that a file gives to the modules of others: ``torch``, ``np``."""
    imports = [alias for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return {
        (alias.asname or alias.name).split(".")[0] for alias in imports if not alias.name.startswith("mae_ast_fast")
    }


def packed_calls(tree: ast.AST, names: set[str], own_args: str | None = None) -> Iterator[ast.Call]:
    """Calls of ``names`` with a starred argument.

    Args:
        tree: Module or a part of one.
        names: Names of functions and classes to look for.
        own_args: Name of the ``*args`` of the function around ``tree``, which it may pass on.
    """
    for node in ast.iter_child_nodes(tree):
        inner = own_args
        if isinstance(node, (*FUNCTIONS, ast.Lambda)):
            inner = node.args.vararg.arg if node.args.vararg else None
        if isinstance(node, ast.Call) and called_name(node) in names:
            starred = [argument.value for argument in node.args if isinstance(argument, ast.Starred)]
            if any(not (isinstance(value, ast.Name) and value.id == own_args) for value in starred):
                yield node
        yield from packed_calls(node, names, inner)


def called_name(call: ast.Call) -> str | None:
    """Last name of what is called: ``c`` of ``a.b.c(...)``."""
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else None


def first_name(call: ast.Call) -> str | None:
    """First name of what is called: ``a`` of ``a.b.c(...)``."""
    node: ast.AST = call.func
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def main(folders: list[str]) -> int:
    """Print the packed calls of the folders' files; 1 if there are any."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths]
    names = defined_names(trees)
    failed = 0
    for path, tree in zip(paths, trees, strict=True):
        libraries, variadic = library_names(tree), variadic_names(tree)
        for call in packed_calls(tree, names):
            if first_name(call) in libraries or (isinstance(call.func, ast.Name) and call.func.id in variadic):
                continue
            failed = 1
            print(f"{path.relative_to(ROOT)}:{call.lineno}: packed arguments, pass them by name: {ast.unparse(call)}")
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(FOLDERS)))
