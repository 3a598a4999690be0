"""Finds the texts of the program's messages in its source: what an f-string inserts is `…`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path


def message_texts(package: Path) -> Iterator[str]:
    """Yield each string of a module, or of all modules of a package, joined as the parser joins it. No docstrings."""
    for path in sorted(package.rglob("*.py")) if package.is_dir() else [package]:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        statements = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if _is_text(part) else "…" for part in node.values)  # type: ignore[attr-defined]
            elif _is_text(node) and id(node) not in statements:
                yield node.value  # type: ignore[attr-defined]


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
