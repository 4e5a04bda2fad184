"""Every command and every Python block of README.md works.

Each line of a ```bash block and each ```python block is a test of its own. They run with the interpreter that
runs the tests (its folder comes first in PATH) in a scratch folder that looks like the checkout, so a file
they leave there is thrown away. Five kinds of command are not run word for word, each for a reason stated at
its function below: `make`, `pip install`, `folovllm chat` (which is typed to), `folovllm serve` with the `curl` that
talks to it, and lines that only change the shell, which a README may not contain.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from folovllm.entrypoints.openai.local_server import LocalServer
from tools.check_size import tomllib

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
TIMEOUT_S = 300
LANGUAGES = {"bash", "python", "text", "json", "mermaid"}
"""Fences a README may have: bash and python are run, and no command may hide under another name."""
MAKE_RUN = {"help": "make", "demo": "folovllm generate", "docs": "mkdocs build"}
"""Targets whose recipe is carried out here, and what must be in it."""
MAKE_READ = {"test": "-m pytest", "lint": "ruff check", "clean": "rm -rf", "test-lower": "-m pytest"}
"""Targets whose recipe is only read here, and what must be in it."""


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    language: str
    """What stands behind the opening fence; may be empty."""
    line: int
    """Line of its first line of content, counted from 1."""
    text: str
    """Its content, the fence's indentation removed."""


def parse_blocks(markdown: str) -> list[Block]:
    """The fenced blocks of `markdown`, in order; a fence that is never closed is a ValueError."""
    blocks: list[Block] = []
    opened: tuple[str, str, int] | None = None
    content: list[str] = []
    for number, line in enumerate(markdown.splitlines(), start=1):
        if opened is None:
            if match := re.match(r"( *)(```+|~~~+) *([\w+-]*)", line):
                opened, content = (match[2], match[3], number + 1), []
                indent = len(match[1])
        elif line.strip() and set(line.strip()) == {opened[0][0]} and len(line.strip()) >= len(opened[0]):
            blocks.append(Block(opened[1], opened[2], "\n".join(content)))
            opened = None
        else:
            content.append(line[indent:] if not line[:indent].strip() else line)
    if opened is not None:
        raise ValueError(f"the fence before line {opened[2]} is never closed")
    return blocks


def parse_commands(block: Block) -> list[tuple[int, str]]:
    """The commands of a bash block as (line, command), without comments; continued lines are joined."""
    commands: list[tuple[int, str]] = []
    pending, start = "", 0
    for offset, line in enumerate(block.text.splitlines()):
        if not pending:
            start = block.line + offset
            if not line.strip() or line.lstrip().startswith("#"):
                continue
        pending += line
        if line.endswith("\\"):
            pending = pending[:-1]
            continue
        try:
            shlex.split(pending, comments=True)
        except ValueError:  # a quotation that goes on in the next line
            pending += "\n"
            continue
        commands.append((start, pending.strip()))
        pending = ""
    if pending:
        raise ValueError(f"line {start}: a command that does not end")
    return commands


def read_blocks() -> list[Block]:
    """The blocks of README.md; none without that file, which `test_readme_shows_how_to_use_it` reports."""
    return parse_blocks(README.read_text(encoding="utf-8")) if README.exists() else []


BLOCKS = read_blocks()
COMMANDS = [command for block in BLOCKS if block.language == "bash" for command in parse_commands(block)]
SCRIPTS = [(block.line, block.text) for block in BLOCKS if block.language == "python"]


def label(value: object) -> str:
    """A short test id for a command or a script."""
    return re.sub(r"[^\w.,= -]+", "", str(value)[:50])


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """A folder with links to all of the checkout but its environments and its git folder."""
    for path in ROOT.iterdir():
        if not path.name.startswith((".venv", ".git", ".coverage")):
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


def run(command: str, workdir: Path, stdin: str = "") -> str:
    """Run `command` in bash; it must exit with 0; returns its standard output.

    A `make` that runs these tests hands its flags down in the environment; they are not for the commands
    here.
    """
    environment = {name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MFLAGS"}}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    result = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", command],
        cwd=workdir,
        env=environment,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, f"$ {command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def run_make(words: list[str], workdir: Path) -> None:
    """`make TARGET`: its recipe, taken from a dry run.

    The steps that would set up an environment are left out, since the tests already run in one; the others of
    `help`, `demo` and `docs` are carried out with this environment's programs, generated documents going to
    the scratch folder. `test` and `lint` are only read, because they would run this test again, and `clean`
    because it would remove what the tests run in.
    """
    folder = Path(sys.executable).parent
    for target in words[1:]:
        assert target in MAKE_RUN | MAKE_READ, f"no rule here for `make {target}`"
        variables = [f"VENV={folder.parent}", f"DOCS={workdir / 'generated'}"]
        dry = ["make", "-s", "--no-print-directory", "-C", str(ROOT), "--dry-run", target, *variables]
        recipe = run(shlex.join(dry), workdir)
        wanted = (MAKE_RUN | MAKE_READ)[target]
        steps = [line for line in recipe.replace("\\\n", " ").splitlines() if line.startswith(f"{folder}/")]
        steps = [line for line in steps if "-m pip install" not in line]
        if target == "help":
            assert wanted in run(f"make -C {shlex.quote(str(ROOT))} help", workdir)
        elif target in MAKE_READ:
            assert wanted in recipe
        else:
            assert any(wanted in step for step in steps), recipe
            for step in steps:
                run(step, workdir)


def run_pip_install(words: list[str], workdir: Path) -> None:
    """`pip install ...`: a dry run without dependencies, so that no test changes the environment it runs in.

    That builds the package's metadata. An extra that does not exist is only a warning of pip's, so it is
    looked up.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = {extra for word in words for found in re.findall(r"\[(.*?)\]", word) for extra in found.split(",")}
    assert asked <= set(project["optional-dependencies"]), f"unknown extras in {words}"
    arguments = words[words.index("install") + 1 :]
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--dry-run", "--quiet", *arguments]
    run(f"cd {shlex.quote(str(ROOT))} && {shlex.join(command)}", workdir)


SERVE_URL = "http://127.0.0.1:8000"
"""Where the README's server is; here it takes a free port."""


def run_server(words: list[str], request: str, workdir: Path) -> None:
    """`folovllm serve ...`, which does not end: start it, run `request` against it if there is one, and end it."""
    program = Path(sys.executable).parent / words[0]  # as `run` finds it
    with LocalServer(words[2:], command=[str(program), words[1]]) as server:
        if request:
            answer = json.loads(run(request.replace(SERVE_URL, server.url), workdir))
            assert answer["choices"][0]["message"]["content"], answer
        assert server.stop() == 0, server.log()


def run_curl(command: str, workdir: Path) -> None:
    """`curl ...`: to the server that the README has started before."""
    assert SERVE_URL in command
    started = [words for _, line in COMMANDS if (words := shlex.split(line))[:2] == ["folovllm", "serve"]]
    assert started, "README.md starts no server to talk to"
    run_server(started[0], command, workdir)


def run_command(command: str, workdir: Path) -> None:
    """Run one command line of the README as its kind asks for."""
    words = shlex.split(command, comments=True)
    assert words[0] not in {"cd", "source", ".", "export"}, (
        f"`{command}` only changes the shell, so it cannot be tested"
    )
    if words[0] == "make":
        run_make(words, workdir)
    elif words[:2] == ["pip", "install"] or words[1:4] == ["-m", "pip", "install"]:
        run_pip_install(words, workdir)
    elif words[:2] == ["folovllm", "chat"]:
        run(command, workdir, stdin="Say hello.\n/stats\n/reset\n/exit\n")
    elif words[:2] == ["folovllm", "serve"]:
        run_server(words, "", workdir)
    elif words[0] == "curl":
        run_curl(command, workdir)
    else:
        run(command, workdir)


# The README itself


def test_readme_shows_how_to_use_it() -> None:
    """It is there, with the two commands, a command line example and a Python example."""
    assert README.exists(), "README.md missing"
    lines = [command for _, command in COMMANDS]
    for wanted in ["make demo", "make test", "folovllm generate", "folovllm chat", "folovllm serve", "pip install"]:
        assert any(wanted in line for line in lines), f"README.md shows no `{wanted}`"
    assert SCRIPTS, "README.md shows no Python"
    assert {block.language for block in BLOCKS} <= LANGUAGES


def test_readme_links_lead_somewhere() -> None:
    assert README.exists(), "README.md missing"
    text = README.read_text(encoding="utf-8")
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    assert [target for target in targets if target and not (ROOT / target).exists()] == []


@pytest.mark.network
@pytest.mark.parametrize(("line", "command"), COMMANDS, ids=label)
def test_readme_command(line: int, command: str, workdir: Path) -> None:
    run_command(command, workdir)


@pytest.mark.network
@pytest.mark.parametrize(("line", "script"), SCRIPTS, ids=label)
def test_readme_python(line: int, script: str, workdir: Path) -> None:
    path = workdir / "readme_example.py"
    path.write_text(script, encoding="utf-8")
    run(f"python {path.name}", workdir)


# The functions above

SAMPLE = """\
# Title

```bash
# a comment
make demo   # shows it

folovllm generate "two
lines" \\
    --max-tokens 8
```

1. In a list:
   ```python
   if True:
       print("x")
   ```

````text
```bash
not a command
```
````
"""


def test_parse_blocks() -> None:
    blocks = parse_blocks(SAMPLE)
    assert [(block.language, block.line) for block in blocks] == [("bash", 4), ("python", 14), ("text", 19)]
    assert blocks[1].text == 'if True:\n    print("x")'
    assert "not a command" in blocks[2].text


def test_parse_commands() -> None:
    commands = parse_commands(parse_blocks(SAMPLE)[0])
    assert commands == [
        (5, "make demo   # shows it"),
        (7, 'folovllm generate "two\nlines"     --max-tokens 8'),
    ]


@pytest.mark.parametrize("text", ["```bash\nmake demo\n", '```bash\necho "open\n```\n'])
def test_parsing_refuses_what_does_not_end(text: str) -> None:
    with pytest.raises(ValueError, match=r"never closed|does not end"):
        [parse_commands(block) for block in parse_blocks(text)]


@pytest.mark.parametrize(
    "command",
    [
        "false",
        "false | cat",
        "cd folovllm",
        "make unknown",
        "folovllm serve --unknown-flag",
        "curl http://127.0.0.1:1",
        'pip install ".[unknown]"',
        "pip install ./absent",
    ],
)
def test_run_command_can_fail(command: str, workdir: Path) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        run_command(command, workdir)


@pytest.mark.parametrize("command", ["make help", "make test", "make clean", "python -c 'print(1)' | grep 1"])
def test_run_command_passes_what_works(command: str, workdir: Path) -> None:
    run_command(command, workdir)


def test_commands_leave_the_checkout_alone(workdir: Path) -> None:
    run_command("echo x > left_behind.txt && cat pyproject.toml", workdir)
    assert (workdir / "left_behind.txt").exists()
    assert not (ROOT / "left_behind.txt").exists()
