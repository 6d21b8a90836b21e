"""What the file of a revision says: comments for the lint, and whether it does something else offline."""

import ast
import tokenize
from collections.abc import Iterator
from pathlib import Path

__all__ = ["asks_for_offline_mode", "comments", "is_empty"]

_MODE = frozenset({"as_sql", "is_offline_mode"})  # of Alembic's contexts


def comments(path: Path) -> list[str]:
    """Return the comments of a file in Python."""
    with tokenize.open(path) as file:
        return [each.string for each in tokenize.generate_tokens(file.readline) if each.type == tokenize.COMMENT]


def asks_for_offline_mode(path: Path) -> bool:
    """Whether the file, but for `downgrade`, asks Alembic whether it runs offline."""
    names = {getattr(node, "attr", getattr(node, "id", None)) for node in _nodes(_tree(path))}
    return not names.isdisjoint(_MODE)


def is_empty(path: Path) -> bool:
    """Whether `upgrade` has no statement but `pass` and a docstring, as that of a merge."""
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
