"""A local folder in Hugging Face's layout: config.json, tokenizer files, one or more safetensors files.

vLLM: `transformers_utils/config.py` and `model_loader/default_loader.py`. Pickle weights and repositories that
bring code (`auto_map`) are refused: loading a model must never run what it brings along.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from folovllm.model_executor.model_loader.source import NO_TOKENIZER_REMEDY, ModelSource

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from folovllm.model_executor.model_loader.safetensors_reader import SafetensorsFile

INDEX_FILE = "model.safetensors.index.json"
QUANTIZE_FILE = "quantize_config.json"
"""Where AutoGPTQ wrote what newer checkpoints have in config.json as `quantization_config`."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt"}


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`; ValueError names the file and the place of the mistake."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(content).__name__}.")
    return content


def refuse_remote_code(content: dict[str, Any], path: Path) -> None:
    """Raise ValueError if a config asks for code from its repository."""
    if content.get("auto_map"):
        raise ValueError(
            f"{path} has `auto_map`: the model brings its own Python code, which FoloVLLM never runs. Use a "
            "version of the model without it; if the architecture is one of the supported ones, deleting "
            "`auto_map` is enough."
        )


class FolderSource(ModelSource):
    """A folder on this machine."""

    def __init__(self, name: str, folder: Path, tokenizer_source: ModelSource | None = None) -> None:
        super().__init__(name, tokenizer_source)
        self._local_folder = folder

    @property
    def folder(self) -> Path:
        """Where config and tokenizer are."""
        return self._local_folder

    @property
    def weight_folder(self) -> Path:
        """Where the safetensors files are."""
        return self.folder

    def hf_config(self) -> dict[str, Any]:
        """Return the content of config.json, with that of quantize_config.json as `quantization_config` if it has none.

        Raises:
            ValueError: there is no config.json, or it has `auto_map`.
        """
        return dict(self._config)

    def generation_config(self) -> dict[str, Any]:
        """Return the content of generation_config.json, `{}` without one."""
        path = self.folder / "generation_config.json"
        return read_json(path) if path.is_file() else {}

    def weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor of every file; `dtype` changes nothing, as there are no GGUF-quantized ones."""
        for file in self._files:
            yield from file.tensors()

    def num_weight_bytes(self, dtype: torch.dtype | None = None) -> int:
        """Bytes of all tensors as stored."""
        return sum(entry.nbytes for file in self._files for entry in file.entries)

    def load_own_tokenizer(self) -> PreTrainedTokenizerBase:
        """Let transformers' AutoTokenizer read the folder, offline and without code from it."""
        folder = self.folder
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            raise ValueError(
                f"No tokenizer in {folder}: none of {', '.join(TOKENIZER_FILES)} is there. {NO_TOKENIZER_REMEDY}"
            )
        for name in ("config.json", "tokenizer_config.json"):
            if (folder / name).is_file():
                refuse_remote_code(read_json(folder / name), folder / name)
        from transformers import AutoTokenizer

        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # a broken file makes transformers raise almost anything
            raise ValueError(
                f"The tokenizer in {folder} cannot be loaded: {type(error).__name__}: {error}. {NO_TOKENIZER_REMEDY}"
            ) from error
        return tokenizer

    @cached_property
    def _config(self) -> dict[str, Any]:
        path = self.folder / "config.json"
        if not path.is_file():
            ggufs = sorted(self.folder.glob("*.gguf"))
            hint = f" It holds {ggufs[0].name}: give that file's path." if ggufs else ""
            raise ValueError(
                f"model={self.name!r}: {self.folder} has no config.json, which a Hugging Face model folder needs.{hint}"
            )
        config = read_json(path)
        refuse_remote_code(config, path)
        quantize = self.folder / QUANTIZE_FILE
        if config.get("quantization_config") is None and quantize.is_file():
            config["quantization_config"] = {"quant_method": "gptq", **read_json(quantize)}
        return config

    @cached_property
    def _files(self) -> list[SafetensorsFile]:
        """The weight files, with checked headers."""
        from folovllm.model_executor.model_loader.safetensors_reader import SafetensorsFile

        folder = self.weight_folder
        indexed = (folder / INDEX_FILE).is_file()
        expected = self._read_index(folder) if indexed else {self._single_file(folder): set()}
        files = []
        for path, names in expected.items():
            if not path.is_file():
                raise ValueError(f"{folder / INDEX_FILE} names {path.name}, which is missing. Fetch it again.")
            files.append(SafetensorsFile(path))
            absent = sorted(names - {entry.name for entry in files[-1].entries})
            if absent:
                raise ValueError(
                    f"{folder / INDEX_FILE} says that {path.name} has {len(absent)} tensors which it has "
                    f"not, such as {', '.join(absent[:5])}. Fetch both again."
                )
        return files

    def _read_index(self, folder: Path) -> dict[Path, set[str]]:
        """Return file -> names of the tensors that the index says are in it."""
        weight_map = read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{folder / INDEX_FILE} has no `weight_map` from tensor names to files.")
        files: dict[Path, set[str]] = {}
        for tensor, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise ValueError(
                    f"{folder / INDEX_FILE}: tensor {tensor!r} is said to be in {file!r}; only .safetensors "
                    "files of the same folder are read."
                )
            files.setdefault(folder / file, set()).add(tensor)
        return files

    def _single_file(self, folder: Path) -> Path:
        """Return the one weight file of a folder without an index."""
        if (folder / "model.safetensors").is_file():
            return folder / "model.safetensors"
        found = sorted(folder.glob("*.safetensors"))
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(
                f"{folder} has {len(found)} safetensors files ({found[0].name}, ...) but no {INDEX_FILE}, "
                "which says which of them make up the model. Fetch it too."
            )
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLE_SUFFIXES)
        if pickles:
            raise ValueError(
                f"{folder} has weights only as pickle files ({', '.join(pickles[:3])}), which can run code "
                "when loaded and are refused. Convert them to safetensors, or use a version of the model "
                "that has them."
            )
        raise ValueError(
            f"model={self.name!r}: no .safetensors weights in {folder} (pickle weights are never used). For "
            "random weights from the config alone set load_format='dummy'."
        )
