"""Downloads the Python source of the pinned vLLM release next to this file, for reading beside ours.

    python reference/download_vllm.py

Nothing is installed and nothing of it is run: `pip download --no-deps` fetches the wheel from the package
index that pip is configured to use, its Python files are unpacked into reference/vllm-0.24.0/, which git
ignores, and the wheel (hundreds of megabytes, nearly all of it compiled kernels) is thrown away.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSION = "0.24.0"
"""The release that docs/design.md and the notes in our code speak of."""
PLATFORMS = ("manylinux_2_31_x86_64", "manylinux_2_28_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64")
"""vLLM publishes Linux wheels; naming the platform lets other systems download one as well."""


def download(version: str, folder: Path) -> Path:
    """The wheel of vLLM `version`, downloaded into `folder`.

    Raises:
        subprocess.CalledProcessError: pip could not get it; its own message is already on standard error.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--disable-pip-version-check",
        "--no-deps",
        "--dest",
        str(folder),
    ]
    command += [
        "--only-binary=:all:",
        "--implementation=cp",
        "--python-version=3.12",
        "--abi=abi3",
        "--abi=cp312",
    ]
    command += [f"--platform={platform}" for platform in PLATFORMS]
    subprocess.run([*command, f"vllm=={version}"], check=True)
    (wheel,) = folder.glob("vllm-*.whl")
    return wheel


def unpack_sources(wheel: Path, target: Path) -> int:
    """Unpack the Python files and the licence of `wheel` into `target`; returns how many files that were."""
    with zipfile.ZipFile(wheel) as archive:
        names = [
            name
            for name in archive.namelist()
            if name.endswith(".py") or "/licenses/" in name or name.endswith("LICENSE")
        ]
        archive.extractall(target, members=names)
    return len(names)


def main() -> int:
    """Download and unpack, unless that was done before; returns the exit status."""
    parser = argparse.ArgumentParser(description="Download the vLLM source for reading beside FoloVLLM.")
    parser.add_argument("--version", default=VERSION, help="release to download (default: %(default)s)")
    version: str = parser.parse_args().version
    target = Path(__file__).resolve().parent / f"vllm-{version}"
    if target.exists():
        print(f"{target} is already there; delete it to download it again")
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        try:
            wheel = download(version, Path(scratch))
        except subprocess.CalledProcessError as error:
            print(f"pip could not download vllm=={version} (its message is above)", file=sys.stderr)
            return error.returncode
        # Unpacked beside its final place first: an interrupted run leaves nothing that looks complete.
        partial = target.with_name(target.name + ".partial")
        count = unpack_sources(wheel, partial)
        partial.rename(target)
    print(f"{count} files in {target}; start at vllm/v1/engine/core.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
