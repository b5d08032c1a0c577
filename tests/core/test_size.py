"""How many lines the core has: an afternoon's reading is what it is meant to be (`docs/architecture.md`)."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

from support import ROOT

CORE = ROOT / "core" / "loomtune"
REACHED = 6900
"""Lines of code that the core has; 3,000 are aimed at. Lower it whenever there are fewer."""

LOOP = 200
"""The most that the training loop may have."""

BLANK = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def lines_of_code(source: str) -> int:
    """Lines that are neither blank nor comment nor docstring."""
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type not in BLANK]
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    return len(lines - docstrings(source))


def docstrings(source: str) -> set[int]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented) and ast.get_docstring(node)]
    return {line for node in nodes for line in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)}


def counted(folder: Path) -> dict[str, int]:
    """Every file of the core; the kit that authors of plugins run is none of it."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.py"))}
    return {name: lines_of_code(path.read_text()) for name, path in files.items() if not name.startswith("testing/")}


def test_what_is_blank_comment_or_docstring_is_no_line_of_code() -> None:
    source = '''"""A module

of two."""

# a comment
A = """text
of two"""

def f() -> int:
    """Says."""
    return (
        1  # one
    )
'''
    assert lines_of_code(source) == len(["A = text", "of two", "def f", "return (", "1", ")"])


def test_the_core_does_not_grow() -> None:
    files = counted(CORE)
    largest = ", ".join(f"{name} {files[name]}" for name in sorted(files, key=lambda name: -files[name])[:8])
    assert sum(files.values()) <= REACHED, f"{sum(files.values())} lines; the largest: {largest}"


def test_the_training_loop_stays_short() -> None:
    assert counted(CORE)["loop.py"] <= LOOP
