"""What docs/ says is so: links and paths lead somewhere, names exist, Python compiles and, where marked, runs.

In docs/learn the Python blocks whose first line is `# runnable` make up one program per file, as in an interactive
session; one that begins with `# runnable, alone` is a program by itself. A `text` block directly below is its output.
"""

from __future__ import annotations

import ast
import builtins
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.test_m0_readme import Block, parse_blocks

ROOT = Path(__file__).resolve().parents[2]
GENERATED = ROOT / "docs" / "api"
DOCS = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if GENERATED not in p.parents)]
LEARN = [path for path in DOCS if path.parent.name == "learn"]
PACKAGE = ROOT / "folovllm"
RUNNABLE = "# runnable"
ALONE = "# runnable, alone"
NEEDS_MODEL = ("LLM(", "EngineArgs(", "resolve_model_source(")
SEPARATOR = "-" * 8 + " next block " + "-" * 8
TIMEOUT_S = 300

FOREIGN = {
    # vLLM's, where the notes say what it does beyond us.
    "CudagraphDispatcher",
    "EngineCoreProc",
    "compilation/",
    "kv_cache_coordinator.py",
    "multiproc_executor.py",
    "ray_executor.py",
    "reasoning/",
    "renderers/",
    "set_forward_context",
    "single_type_kv_cache_manager.py",
    "tool_parsers/",
    "tracing/",
    # Libraries'.
    "DecodeStream",
    "torch.Generator",
    "torch.compile",
}
"""Backticked names and paths in docs/learn that are not ours; so are paths below v1/."""


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks_of(path: Path) -> list[Block]:
    return parse_blocks(path.read_text(encoding="utf-8"))


def prose(text: str) -> str:
    """`text` without its fenced blocks, line numbers kept."""
    fenced = {
        number
        for block in parse_blocks(text)
        for number in range(block.line - 1, block.line + block.text.count("\n") + 2)
    }
    return "\n".join("" if n in fenced else line for n, line in enumerate(text.splitlines(), start=1))


def slugs(path: Path) -> set[str]:
    """The anchors of a Markdown file's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.*)$", prose(path.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path: Path, text: str) -> list[str]:
    """Relative link targets of `text`, which stands in `path`, that are no file, folder or heading."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        if "://" in target or target.startswith("mailto:"):
            continue
        if not file.exists() or (anchor and anchor not in slugs(file)):
            broken.append(target)
    return broken


def missing_paths(text: str) -> list[str]:
    """Paths of our Python files that `text` names, code included, and that do not exist."""
    paths = re.findall(r"(?<![\w/.-])((?:folovllm|tests|tools|examples|reference)/[\w/]+\.py)\b", text)
    return [path for path in paths if not (ROOT / path).is_file()]


def unknown_paths(text: str) -> list[str]:
    """Backticked `path/to/file.py`s and `folder/`s of `text` that are the end of no path of ours."""
    files = [*PACKAGE.rglob("*"), *(ROOT / "tests").rglob("*"), *ROOT.iterdir()]
    ours = [f"/{path.relative_to(ROOT)}" for path in files if path.is_dir() or path.suffix == ".py"]
    named = re.findall(r"(?<!`)`([\w./]+(?:\.py|/))`(?!`)", prose(text))
    checked = [path for path in named if path not in FOREIGN and not path.startswith(("v1/", "vllm/"))]
    return [name for name in checked if not any(path.endswith("/" + name.rstrip("/")) for path in ours)]


def defined_names() -> set[str]:
    """Every name that the package defines or assigns: classes, functions, attributes, arguments, modules; and tests."""
    names = {"folovllm"}
    for path in (ROOT / "tests").rglob("test_*.py"):
        names.update(re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE))
    for path in PACKAGE.rglob("*.py"):
        names.update(part.removesuffix(".py") for part in path.relative_to(PACKAGE).parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                names.add(node.name)
            elif isinstance(node, ast.arg):
                names.add(node.arg)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
    return names


def unknown_names(text: str, known: set[str]) -> list[str]:
    """Backticked `CamelCase`, `with_underscore`, `call()` and `dotted.name`s of `text` that nothing defines."""
    unknown = []
    for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(text)):
        name = code.removesuffix("()")
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name) or name.endswith((".py", ".md", ".yml")):
            continue
        is_name = name != code or "." in name or "_" in name or re.search(r"[A-Z]\w*[a-z]", name)
        if is_name and name not in FOREIGN and name not in vars(builtins) and not set(name.split(".")) <= known:
            unknown.append(code)
    return unknown


def programs(path: Path) -> list[list[tuple[Block, str | None]]]:
    """The runnable programs of a document: blocks that belong together, each with what it should print."""
    session: list[tuple[Block, str | None]] = []
    found = [session]
    blocks = blocks_of(path)
    for block, below in zip(blocks, [*blocks[1:], None], strict=True):
        if block.language != "python" or not block.text.startswith(RUNNABLE):
            continue
        end = block.line + block.text.count("\n") + 1
        directly_below = below is not None and below.language == "text" and below.line <= end + 3
        entry = (block, below.text if below is not None and directly_below else None)
        if block.text.startswith(ALONE):
            found.append([entry])
        else:
            session.append(entry)
    return [program for program in found if program]


def run_program(source: str, folder: Path) -> str:
    """Run `source` as a file in `folder`, with this interpreter and our package; return what it printed."""
    script = folder / "snippet.py"
    script.write_text(source, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    result = subprocess.run(
        [sys.executable, script.name],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, f"{source}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def without_margin(text: str) -> list[str]:
    """Lines without trailing blanks, and without empty lines at both ends."""
    return [line.rstrip() for line in text.strip("\n").splitlines()]


PROGRAMS = [
    pytest.param(
        path,
        program,
        id=f"{path.stem}-line-{program[0][0].line}",
        marks=[pytest.mark.network] if any(word in block.text for block, _ in program for word in NEEDS_MODEL) else [],
    )
    for path in LEARN
    for program in programs(path)
]


def test_the_notes_are_there() -> None:
    assert {"00_overview.md", "01_basic_inference.md"} <= {path.name for path in LEARN}
    assert len(PROGRAMS) >= 4


@pytest.mark.parametrize("path", DOCS, ids=label)
def test_links_lead_somewhere(path: Path) -> None:
    assert broken_links(path, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", [path for path in DOCS if path.name != "design.md"], ids=label)
def test_named_files_exist(path: Path) -> None:
    """The design alone may name files that are to come."""
    assert missing_paths(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", LEARN, ids=label)
def test_backticked_names_are_ours(path: Path) -> None:
    assert unknown_names(path.read_text(encoding="utf-8"), defined_names()) == []


@pytest.mark.parametrize("path", LEARN, ids=label)
def test_backticked_paths_are_ours(path: Path) -> None:
    assert unknown_paths(path.read_text(encoding="utf-8")) == []


def test_foreign_names_are_foreign_and_needed() -> None:
    """The list excuses nothing that is ours, and nothing that no note mentions."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in LEARN)
    assert FOREIGN & defined_names() == set()
    assert [name for name in sorted(FOREIGN) if f"`{name}`" not in text and f"`{name}()`" not in text] == []


@pytest.mark.parametrize("path", DOCS, ids=label)
def test_python_blocks_compile(path: Path) -> None:
    for block in blocks_of(path):
        if block.language == "python":
            compile(block.text, f"{label(path)}:{block.line}", "exec")


@pytest.mark.parametrize(("path", "program"), PROGRAMS)
def test_runnable_blocks_run_and_print_what_is_shown(
    path: Path, program: list[tuple[Block, str | None]], tmp_path: Path
) -> None:
    source = f"\nprint({SEPARATOR!r})\n".join(block.text for block, _ in program)
    printed = run_program(source, tmp_path).split(SEPARATOR + "\n")
    for (block, expected), actual in zip(program, printed, strict=True):
        if expected is not None:
            assert without_margin(actual) == without_margin(expected), f"{label(path)}:{block.line}"


# The functions above


def test_broken_links() -> None:
    path = ROOT / "docs" / "learn" / "note.md"
    good = "[a](../../folovllm/request.py) [b](https://example.org/x) [c](../design.md#1-principles)"
    assert broken_links(path, good + "\n```text\n[x](absent.md)\n```\n") == []
    assert broken_links(path, "[a](absent.md) [b](../design.md#nothing)") == ["absent.md", "../design.md#nothing"]


def test_missing_paths() -> None:
    good = "`folovllm/core/sched/scheduler.py`, vllm/v1/core/absent.py, ../../folovllm/request.py, a/tests/absent.py"
    assert missing_paths(good) == []
    assert missing_paths("```bash\npytest tests/unit/absent.py\n```\n`folovllm/absent.py`") == [
        "tests/unit/absent.py",
        "folovllm/absent.py",
    ]


def test_unknown_paths() -> None:
    assert unknown_paths("`core/sched/scheduler.py` `worker/` `request.py` `v1/absent.py` `reference/`") == []
    assert unknown_paths("`core/absent.py` `sched/request.py` `nowhere/`") == [
        "core/absent.py",
        "sched/request.py",
        "nowhere/",
    ]


def test_unknown_names() -> None:
    known = defined_names()
    good = "`Scheduler.schedule()` `num_computed_tokens` `KVCacheManager` `[T, E]` `plain` `--block-size` `core/x.py`"
    assert unknown_names(good + "\n```python\nNoSuchClass()\n```\n", known) == []
    bad = "`NoSuchClass` `Scheduler.no_such_method` `nosuchcall()` `no_such_field`"
    assert unknown_names(bad, known) == ["NoSuchClass", "Scheduler.no_such_method", "nosuchcall()", "no_such_field"]


SESSION = """\
```python
# runnable
x = 1
print(x)
```

```text
1
```

```python
# runnable, alone
print("another")
```

Something between, so this is a drawing and not its output:

```text
drawing
```

```python
# runnable
print(x + 1)
```
"""


def test_programs(tmp_path: Path) -> None:
    path = tmp_path / "note.md"
    path.write_text(SESSION, encoding="utf-8")
    assert [[expected for _, expected in program] for program in programs(path)] == [["1", None], [None]]


def test_run_program_can_fail(tmp_path: Path) -> None:
    assert run_program("print('é')", tmp_path) == "é\n"
    with pytest.raises(AssertionError):
        run_program("raise SystemExit(3)", tmp_path)
