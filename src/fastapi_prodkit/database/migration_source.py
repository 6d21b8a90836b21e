"""Read the source of a revision: its comments, and whether it depends on offline mode."""

import ast
import tokenize
from collections.abc import Iterator
from pathlib import Path

__all__ = ["asks_for_offline_mode", "comments", "is_empty"]

_MODE = frozenset({"as_sql", "is_offline_mode"})  # attributes of Alembic's contexts


def comments(path: Path) -> list[str]:
    """Return the comments of a Python file."""
    with tokenize.open(path) as file:
        return [each.string for each in tokenize.generate_tokens(file.readline) if each.type == tokenize.COMMENT]


def asks_for_offline_mode(path: Path) -> bool:
    """Return whether the file asks Alembic if it runs offline, outside of `downgrade`."""
    names = {getattr(node, "attr", getattr(node, "id", None)) for node in _nodes(_tree(path))}
    return not names.isdisjoint(_MODE)


def is_empty(path: Path) -> bool:
    """Return whether `upgrade` has only `pass` or a docstring, as in a merge."""
    functions = [node for node in _tree(path).body if isinstance(node, ast.FunctionDef) and node.name == "upgrade"]
    statements = [statement for function in functions for statement in function.body]
    return all(
        isinstance(each, ast.Pass) or (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))
        for each in statements
    )


def _tree(path: Path) -> ast.Module:
    with tokenize.open(path) as file:
        return ast.parse(file.read())


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.FunctionDef) and child.name == "downgrade"):
            yield child
            yield from _nodes(child)
