"""Fails when a file or a function of the package has grown past what a reader takes in at once.

Limits: 600 lines for a file, 60 for a function. A function counts from its `def` line to its last line,
functions nested in it included, decorators and its own docstring not: explaining more never costs a function
its place.

The exceptions stand in tools/size_allowlist.toml, one `[[allow]]` table each:

    name = "folovllm/core/sched/scheduler.py::Scheduler.schedule"   # or a file: "folovllm/config.py"
    max_lines = 75    # its own limit: an exception does not grow either
    reason = "..."    # why it may be longer

An entry that is no longer needed is an error, like one without a reason.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_FILE_LINES = 600
"""Lines a file may have, blank lines and comments included."""
MAX_FUNCTION_LINES = 60
"""Lines a function may have, its docstring not counted."""
ALLOWLIST = Path("tools/size_allowlist.toml")
"""Where the exceptions are listed, relative to the repository's root."""


@dataclass(frozen=True)
class Item:
    """One measured file or function."""

    name: str
    """`folovllm/a.py` for a file, `folovllm/a.py::Class.method` for a function."""
    lines: int
    """Its length, as the module's docstring counts."""
    limit: int
    """The length that items of its kind may have."""


@dataclass(frozen=True)
class Allowed:
    """One entry of the allow-list."""

    name: str
    """The name of the `Item` it is for."""
    max_lines: int
    """The length that this item may have."""
    reason: str
    """Why; never empty."""


def function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end of `node`, without the lines of its own docstring."""
    assert node.end_lineno is not None  # set for every node that ast.parse returns
    total = node.end_lineno - node.lineno + 1
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        assert first.end_lineno is not None
        total -= first.end_lineno - first.lineno + 1
    return total


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function below `node` with its dotted name, in the order of the file."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield prefix + child.name, child
            yield from _functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")
        else:
            yield from _functions(child, prefix)


def measure(root: Path, package: str) -> list[Item]:
    """All files of the folder `root/package`, each followed by its functions."""
    items: list[Item] = []
    for path in sorted((root / package).rglob("*.py")):
        name = path.relative_to(root).as_posix()
        source = path.read_text(encoding="utf-8")
        items.append(Item(name, len(source.splitlines()), MAX_FILE_LINES))
        for function, node in _functions(ast.parse(source, filename=name), ""):
            items.append(Item(f"{name}::{function}", function_lines(node), MAX_FUNCTION_LINES))
    return items


def read_allowlist(path: Path) -> list[Allowed]:
    """The entries of the allow-list at `path`; none when there is no such file.

    Raises:
        ValueError: an entry lacks a key, has an unknown one, one of the wrong type, or an empty reason.
    """
    if not path.exists():
        return []
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    kinds = {"name": str, "max_lines": int, "reason": str}
    for number, entry in enumerate(data.get("allow", []), start=1):
        wrong = sorted(set(entry) ^ set(kinds)) or [
            key for key, kind in kinds.items() if not isinstance(entry[key], kind)
        ]
        if wrong or not entry["reason"].strip():
            raise ValueError(
                f"{path}: entry {number} needs name (text), max_lines (whole number) and a reason that says "
                f"something; wrong here: {', '.join(wrong) or 'reason'}"
            )
    return [Allowed(**entry) for entry in data.get("allow", [])]


def find_problems(items: list[Item], allowed: list[Allowed]) -> list[str]:
    """One line for each item over its limit and for each entry of the allow-list that is stale."""
    problems: list[str] = []
    by_name = {entry.name: entry for entry in allowed}
    if len(by_name) < len(allowed):
        problems.append("allow-list: the same name is listed twice")
    seen: dict[str, Item] = {}
    for item in items:
        # Two functions may share a name (a property and its setter): the longer one speaks for both.
        if item.name not in seen or item.lines > seen[item.name].lines:
            seen[item.name] = item
    for item in seen.values():
        limit = by_name[item.name].max_lines if item.name in by_name else item.limit
        if item.lines > limit:
            problems.append(f"{item.name}: {item.lines} lines, {limit} allowed")
    for entry in allowed:
        if entry.name not in seen:
            problems.append(f"allow-list: {entry.name} does not exist; remove the entry")
        elif seen[entry.name].lines <= seen[entry.name].limit:
            problems.append(f"allow-list: {entry.name} needs no exception any more; remove the entry")
    return problems


def main(argv: list[str] | None = None) -> int:
    """Checks the package below the given root; prints every problem; returns 1 if there is one, else 0."""
    parser = argparse.ArgumentParser(description="Check the length of the package's files and functions.")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent)
    parser.add_argument("--package", default="folovllm")
    options = parser.parse_args(argv)
    items = measure(options.root, options.package)
    if not items:
        print(f"size check: no Python file below {options.root / options.package}", file=sys.stderr)
        return 1
    try:
        problems = find_problems(items, read_allowlist(options.root / ALLOWLIST))
    except ValueError as error:
        problems = [str(error)]
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"size check: {len(items)} files and functions, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
