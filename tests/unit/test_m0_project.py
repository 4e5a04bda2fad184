"""The project's own rules hold: light imports, the dependency rule, sizes, safe loading, the Makefile."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import check_size

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "folovllm"
TORCH_FREE = ["request", "sampling_params", "config", "outputs", "utils/common"]
"""Files that, like the whole core, import no torch when they are imported."""


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter that finds this checkout's package."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


# --- imports


@pytest.mark.parametrize("module", ["torch", "transformers", "numpy"])
def test_import_folovllm_is_light(module: str) -> None:
    result = run_python(f"import sys, folovllm; folovllm.__version__; sys.exit({module!r} in sys.modules)")
    assert result.returncode == 0, f"import folovllm imports {module}\n{result.stderr}"


def test_version_has_one_source() -> None:
    import folovllm
    from folovllm.version import __version__

    assert folovllm.__version__ == __version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)


def test_core_imports_with_torch_blocked() -> None:
    """Every module of the core, and what it is made of, imports where torch cannot be imported at all."""
    files = [*sorted((PACKAGE / "core").rglob("*.py")), *(PACKAGE / f"{name}.py" for name in TORCH_FREE)]
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    assert "folovllm.core.sched.scheduler" in modules
    code = "import importlib as i, sys\nsys.modules['torch'] = None\nfor m in sys.argv[1:]: i.import_module(m)"
    result = run_python(code, *(module.removesuffix(".__init__") for module in modules))
    assert result.returncode == 0, result.stderr


# --- the dependency rule


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter with this project's contracts on the package `folovllm` in `folder`."""
    shutil.copy(ROOT / "pyproject.toml", folder)
    code = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", code, "--no-cache"]
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def tiny_package(tmp_path: Path) -> Path:
    """The folder of a package of empty modules in the shape of ours, for the contracts to judge."""
    package = tmp_path / "folovllm"
    for folder in [
        "",
        "core",
        "engine",
        "executor",
        "worker",
        "model_executor",
        "attention",
        "sample",
        "utils",
    ]:
        (package / folder).mkdir(parents=True, exist_ok=True)
        (package / folder / "__init__.py").touch()
    for module in [
        "request",
        "sampling_params",
        "config",
        "outputs",
        "core/scheduler",
        "worker/runner",
        "utils/common",
    ]:
        (package / f"{module}.py").touch()
    return package


def test_contracts_pass_on_legal_imports(tiny_package: Path) -> None:
    (tiny_package / "worker/runner.py").write_text("import torch\nfrom folovllm.outputs import x\n")
    (tiny_package / "core/scheduler.py").write_text(
        "from typing import TYPE_CHECKING\nimport folovllm.request\nif TYPE_CHECKING:\n    import torch\n"
    )
    result = lint_imports(tiny_package.parent)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 kept, 0 broken" in result.stdout


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        ("core/scheduler", "import torch", "never imports torch"),
        ("core/scheduler", "def f():\n    from torch import nn", "never imports torch"),
        ("config", "import torch.nn", "never imports torch"),
        # Indirectly: core uses utils.common, which imports torch.
        ("utils/common", "import torch", "never imports torch"),
        ("core/scheduler", "from folovllm.worker import runner", "does not know what executes"),
        ("worker/runner", "from folovllm.core import scheduler", "Arrows never point back"),
        ("executor/__init__", "import folovllm.core.scheduler", "Arrows never point back"),
        ("attention/__init__", "import folovllm.model_executor", "Arrows never point back"),
        ("utils/common", "import folovllm.engine", "Arrows never point back"),
    ],
)
def test_contracts_catch_a_forbidden_import(tiny_package: Path, module: str, line: str, broken: str) -> None:
    (tiny_package / "core/scheduler.py").write_text("import folovllm.utils.common\n")
    path = tiny_package / f"{module}.py"
    path.write_text(path.read_text() + line + "\n")
    result = lint_imports(tiny_package.parent)
    assert result.returncode != 0
    assert re.search(rf"{broken}.* BROKEN", result.stdout), result.stdout + result.stderr


def test_contracts_catch_a_module_without_a_layer(tiny_package: Path) -> None:
    (tiny_package / "elsewhere.py").touch()
    result = lint_imports(tiny_package.parent)
    assert result.returncode != 0
    assert "elsewhere" in result.stdout


# --- the size check


def size_check(tmp_path: Path, source: str, allowlist: str = "") -> int:
    (tmp_path / "pkg").mkdir(exist_ok=True)
    (tmp_path / "pkg/m.py").write_text(source)
    (tmp_path / "tools").mkdir(exist_ok=True)
    (tmp_path / "tools/size_allowlist.toml").write_text(allowlist)
    return check_size.main(["--root", str(tmp_path), "--package", "pkg"])


def function_of(lines: int, docstring: int = 0, indent: str = "") -> str:
    """Source of a function whose code has `lines` lines, and its docstring `docstring` more."""
    documented = (
        [f'{indent}    """Text.', *[f"{indent}    Text."] * (docstring - 2), f'{indent}    """'] if docstring else []
    )
    body = [f"{indent}    x = 1"] * (lines - 1)
    return "\n".join([f"{indent}def f() -> None:", *documented, *body]) + "\n"


def allow(name: str, max_lines: int = 100, reason: str = "one loop, told in order") -> str:
    return f'[[allow]]\nname = "{name}"\nmax_lines = {max_lines}\nreason = "{reason}"\n'


def test_size_check_passes_at_the_limits(tmp_path: Path) -> None:
    assert size_check(tmp_path, "@cache\n" + function_of(60, docstring=30)) == 0
    assert size_check(tmp_path, "x = 1\n" * 600) == 0


def test_size_check_lists_every_offender(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nested = "class C:\n    def outer(self) -> None:\n" + function_of(61, indent="        ")
    assert size_check(tmp_path, nested + function_of(61) + "x = 1\n" * 600) == 1
    shown = capsys.readouterr().err
    for offender in [
        "pkg/m.py: 724 lines, 600",
        "m.py::C.outer: 62 lines, 60",
        "m.py::C.outer.f: 61",
        "m.py::f: 61",
    ]:
        assert offender in shown


def test_size_check_allow_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert size_check(tmp_path, function_of(61), allow("pkg/m.py::f")) == 0
    assert size_check(tmp_path, "x = 1\n" * 601, allow("pkg/m.py", 650)) == 0
    assert size_check(tmp_path, function_of(101), allow("pkg/m.py::f")) == 1
    assert "101 lines, 100 allowed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("allowlist", "message"),
    [
        (allow("pkg/m.py::f"), "needs no exception any more"),
        (allow("pkg/m.py::gone"), "does not exist"),
        (allow("pkg/m.py::f", reason=" "), "wrong here: reason"),
        ('[[allow]]\nname = "pkg/m.py::f"\nreason = "x"\n', "wrong here: max_lines"),
        (allow("pkg/m.py::f") * 2, "listed twice"),
    ],
)
def test_size_check_refuses_a_bad_allow_list(
    tmp_path: Path, allowlist: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert size_check(tmp_path, function_of(60), allowlist) == 1
    assert message in capsys.readouterr().err


def test_size_check_of_nothing_fails(tmp_path: Path) -> None:
    assert check_size.main(["--root", str(tmp_path), "--package", "absent"]) == 1


# --- nothing that runs what it reads

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "builtins.eval", "builtins.exec", "torch.load", "os.system"}
"""By dotted name, so that `model.eval()` is not meant."""
FORBIDDEN_FLAGS = {"trust_remote_code", "allow_pickle"}


def dotted(node: ast.expr) -> str:
    """`a.b.c` for a plain chain of names, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr}"
    return ""


def unsafe(source: str) -> list[str]:
    """What in `source` could execute the data it is given, as `line: what`."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
            found += [(node.lineno, f"import {name}") for name in names if name in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [
                f"{node.module}.{alias.name}"
                for alias in node.names
                if f"{node.module}.{alias.name}" in FORBIDDEN_CALLS
            ]
            names += [node.module] if node.module.split(".")[0] in FORBIDDEN_MODULES else []
            found += [(node.lineno, f"import of {name}") for name in names]
        elif isinstance(node, ast.Attribute | ast.Name) and dotted(node) in FORBIDDEN_CALLS:
            found.append((node.lineno, dotted(node)))
        elif isinstance(node, ast.keyword) and node.arg in FORBIDDEN_FLAGS:
            off = isinstance(node.value, ast.Constant) and node.value.value is False
            found += [] if off else [(node.value.lineno, f"{node.arg} not False")]
    return [f"{line}: {what}" for line, what in found]


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\nx = torch.load('f')",
        "from torch import load",
        "eval('1')",
        "run = exec",
        "AutoConfig.from_pretrained(m, trust_remote_code=True)",
        "AutoConfig.from_pretrained(m, trust_remote_code=flag)",
        "np.load(f, allow_pickle=True)",
    ],
)
def test_unsafe_sees(source: str) -> None:
    assert unsafe(source)


def test_unsafe_is_not_fooled_by_innocent_code() -> None:
    source = "# torch.load, pickle\nmodel.eval()\nf(trust_remote_code=False)\nx = 'eval(1)'\njson.load(f)"
    assert unsafe(source) == []


def test_package_never_executes_data() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 10
    problems = {str(path.relative_to(ROOT)): unsafe(path.read_text(encoding="utf-8")) for path in files}
    assert {name: lines for name, lines in problems.items() if lines} == {}


# --- project files


def test_every_folder_of_the_package_is_a_package() -> None:
    """Without its __init__.py a folder would escape the contracts of import-linter."""
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def requirement_names(lines: list[str]) -> set[str]:
    return {re.split(r"[\s<>=!~;\[]", line, maxsplit=1)[0].lower().replace("_", "-") for line in lines}


def declared(group: str | None = None) -> list[str]:
    """The dependencies in pyproject.toml: the base ones, or those of the extra `group`."""
    project = check_size.tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return list(project["optional-dependencies"][group] if group else project["dependencies"])


def pins(name: str) -> list[str]:
    lines = (line.strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def test_constraints_pin_every_dependency_exactly() -> None:
    lines = pins("constraints.txt")
    assert "torch==2.13.0" in lines
    for line in lines:
        assert re.fullmatch(r'[a-z0-9._-]+==[0-9][0-9a-z.]*( ; python_version (<|>=) "3\.11")?', line), line
    pinned = requirement_names(lines)
    for group in [None, "structured", "server", "quant", "bench", "dev"]:
        missing = requirement_names(declared(group)) - pinned - {"folovllm"}  # "folovllm[server]": another extra
        assert not missing, f"constraints.txt does not pin {missing}, wanted by {group or 'the base install'}"


def test_lower_constraints_are_the_lower_bounds() -> None:
    """constraints-lower.txt has each direct dependency at its bound, except torch, which it explains."""
    lower = dict(line.split("==") for line in pins("constraints-lower.txt"))
    bounds = dict(re.split(">=|,", line)[:2] for line in declared())
    assert set(lower) == set(bounds)
    for name in set(lower) - {"torch"}:
        padded = bounds[name] + ".0" * (2 - bounds[name].count("."))
        assert lower[name] == padded, (
            f"{name}: >={bounds[name]} in pyproject.toml, {lower[name]} in constraints-lower.txt"
        )


def dry_run(target: str) -> str:
    """The recipe of `make TARGET`."""
    command = ["make", "--dry-run", target, f"VENV={sys.prefix}"]
    # Without the flags of a `make` that may be running these tests.
    environment = {name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MFLAGS"}}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return result.stdout


def test_make_test_runs_every_check() -> None:
    """`make test`, as a dry run: every check that the project promises is in its recipe, in this order."""
    recipe = dry_run("test")
    checks = [
        "ruff check",
        "ruff format --check",
        "mypy",
        "lint-imports",
        "check_size.py",
        "mkdocs build --strict",
        "--cov-fail-under=85",
        "-O -m pytest",
    ]
    assert [recipe.index(check) for check in checks] == sorted(recipe.index(check) for check in checks)


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").rstrip().endswith("make test")


def test_license_is_apache() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text


@pytest.mark.parametrize(("link", "code"), [("index.md", 0), ("nowhere.md", 1)])
def test_lint_refuses_a_broken_link(link: str, code: int, tmp_path: Path) -> None:
    """The command of `make lint`, on a site of one page."""
    recipe = dry_run("lint")
    line = next(line for line in recipe.splitlines() if "mkdocs build" in line)
    flags = line.partition(" build ")[2].partition("--site-dir")[0].split()
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Home\n\n[a link]({link})\n", encoding="utf-8")
    (tmp_path / "mkdocs.yml").write_text("site_name: tiny\n", encoding="utf-8")
    build = [sys.executable, "-m", "mkdocs", "build", *flags, "--site-dir", "site"]
    result = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert "--strict" in flags and result.returncode == code, result.stderr


@pytest.mark.slow
def test_site_has_a_page_for_every_module_and_document(tmp_path: Path) -> None:
    """`make docs`: strict, so that a broken link is an error; and complete."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    for path in (ROOT / "folovllm").rglob("*.py"):
        if path.name != "__main__.py":
            page = path.with_name("index.html") if path.name == "__init__.py" else path.with_suffix(".html")
            assert (tmp_path / "api" / page.relative_to(ROOT)).is_file(), page
    for path in (ROOT / "docs").rglob("*.md"):
        assert (tmp_path / path.relative_to(ROOT / "docs")).with_suffix(".html").is_file(), path
    assert "max_tokens" in (tmp_path / "api" / "folovllm" / "sampling_params.html").read_text(encoding="utf-8")
    # Nothing that a reader's browser would fetch from elsewhere.
    home = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r'<(?:script|link rel="stylesheet"|img)[^>]+(?:src|href)="https?:', home)
