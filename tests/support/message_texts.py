"""Finds the texts of the program's messages in its source: what an f-string inserts is `…`."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path


@cache  # parsing all modules takes half a second
def message_texts(module: Path) -> tuple[str, ...]:
    """Return each string of a module, joined as the parser joins it. No docstrings."""
    nodes = list(ast.walk(ast.parse(module.read_text(encoding="utf-8"))))
    statements = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    return tuple(
        "".join(part.value if _is_text(part) else "…" for part in node.values)  # type: ignore[attr-defined]
        if isinstance(node, ast.JoinedStr)
        else node.value  # type: ignore[attr-defined]
        for node in nodes
        if isinstance(node, ast.JoinedStr) or (_is_text(node) and id(node) not in statements)
    )


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
