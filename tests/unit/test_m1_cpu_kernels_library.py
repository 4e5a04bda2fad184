"""How the C kernels' library is compiled, kept and refused: each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from folovllm.utils import cpu_kernels
from tests.unit.test_m1_cpu_kernels import HAS_COMPILER

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="no C compiler")

REPORT = "from folovllm.utils import cpu_kernels; print(*cpu_kernels.available(), sep='|')"


def available_in(cache: Path, **environment: str) -> tuple[bool, str]:
    code = subprocess.run(
        [sys.executable, "-c", REPORT],
        env={**os.environ, "FOLOVLLM_CACHE": str(cache), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    usable, reason = code.stdout.strip().split("|", 1)
    return usable == "True", reason


def test_the_library_is_compiled_once(tmp_path: Path) -> None:
    usable, how = available_in(tmp_path)
    assert usable and how.startswith("compiled by")
    (library,) = (tmp_path / "kernels").iterdir()
    assert (tmp_path / "kernels").stat().st_mode & 0o077 == 0
    assert available_in(tmp_path) == (True, f"compiled before, {library}")
    library.chmod(0o777)
    assert available_in(tmp_path)[1].startswith("compiled by"), "others may have changed it: not trusted"


def test_a_failing_compiler_is_quoted(tmp_path: Path) -> None:
    compiler = tmp_path / "bad-cc"
    compiler.write_text(
        "#!/bin/sh\ncase \"$1\" in --version) echo bad 1.0;; *) echo 'no such luck' >&2; exit 3;; esac\n"
    )
    compiler.chmod(0o755)
    usable, reason = available_in(tmp_path, CC=str(compiler))
    assert not usable and "no such luck" in reason
    assert not list((tmp_path / "kernels").iterdir()), "nothing is left behind"


def test_no_compiler_and_switched_off(tmp_path: Path) -> None:
    assert available_in(tmp_path, CC="no-such-compiler")[1].startswith("no C compiler")
    assert available_in(tmp_path, FOLOVLLM_CPU_KERNELS="0") == (False, cpu_kernels.SWITCHED_OFF)
    assert not (tmp_path / "kernels").exists()


def test_a_folder_that_others_may_write_to_is_not_trusted(tmp_path: Path) -> None:
    available_in(tmp_path)
    (tmp_path / "kernels").chmod(0o777)
    usable, reason = available_in(tmp_path)
    assert not usable and "may be written by, others" in reason


@pytest.mark.badinput
def test_the_switch_is_0_or_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLOVLLM_CPU_KERNELS", "no")
    with pytest.raises(ValueError, match=r"FOLOVLLM_CPU_KERNELS='no' must be 0 .* or 1"):
        cpu_kernels.available.__wrapped__()
