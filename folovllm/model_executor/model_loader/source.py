"""One abstraction for "where the model is": config, tokenizer and a stream of weights, from one string.

vLLM spreads this over `transformers_utils/config.py`, `tokenizers/` and one loader class per format
(`model_loader/default_loader.py`, `gguf_loader.py`). Nothing here imports torch or transformers before it is
needed, so that a configuration can be resolved, and `--help` printed, quickly.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from folovllm.config import LOAD_FORMATS
from folovllm.utils.common import check_choice

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

ALTERNATIVES = (
    "Alternatives: a local folder with config.json and .safetensors files, a local .gguf file, the built-in "
    "name 'smollm2-135m-instruct', or another hub mirror (environment variable HF_ENDPOINT)."
)
NO_TOKENIZER_REMEDY = (
    "Name a folder, hub id or .gguf file that has one with `tokenizer=...`, or set "
    "`skip_tokenizer_init=True` and give prompts as prompt_token_ids."
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class ModelSource(ABC):
    """A model somewhere: what it is (`hf_config`), how it reads text (`tokenizer`) and its `weights`.

    Methods read lazily, so that an error in the config is reported before any weight is downloaded. All raise
    ValueError naming the file, what is wrong with it and the remedy.
    """

    def __init__(self, name: str, tokenizer_source: ModelSource | None = None) -> None:
        self.name = name
        """The string that the user gave."""
        self._tokenizer_source = tokenizer_source

    @abstractmethod
    def hf_config(self) -> dict[str, Any]:
        """The model's `config.json` as a dict (for GGUF: derived from the file's metadata)."""

    @abstractmethod
    def generation_config(self) -> dict[str, Any]:
        """The content of `generation_config.json`, `{}` without one (GGUF: `{"eos_token_id": [ids]}`)."""

    @abstractmethod
    def weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (Hugging Face parameter name, CPU tensor) one at a time, holding none of them.

        `dtype` is what quantized (GGUF) tensors are expanded to, None meaning float32; tensors that are
        stored as plain numbers come in the type they are stored in. Drop each tensor before asking for the
        next one, or two live at once.
        """

    @abstractmethod
    def num_weight_bytes(self, dtype: torch.dtype | None = None) -> int:
        """Bytes of all tensors as `weights(dtype)` yields them."""

    @abstractmethod
    def load_own_tokenizer(self) -> PreTrainedTokenizerBase:
        """Build the tokenizer that comes with this model; ValueError says what is missing and the remedy."""

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Build the tokenizer: the one named with `tokenizer=`, else the model's own. Raises ValueError."""
        return (self._tokenizer_source or self).load_own_tokenizer()


def resolve_model_source(
    model: str,
    *,
    revision: str | None = None,
    load_format: str = "auto",
    tokenizer: str | None = None,
    download_dir: str | None = None,
) -> ModelSource:
    """Return the source that `model` names, tried in this order.

    1. A built-in name (`named.py`), whatever its case; write `./name` for a folder called like one.
    2. A `.gguf` file.
    3. A local folder in Hugging Face's layout.
    4. A Hugging Face hub id, `name` or `organisation/name`, at `revision`.

    Args:
        model: the string above; `~` is expanded.
        revision: branch, tag or commit; only a hub id has one.
        load_format: one of LOAD_FORMATS; "dummy" promises that `weights()` is never asked for, so that a
            folder with nothing but config.json will do.
        tokenizer: another model string to take the tokenizer from.
        download_dir: where downloads are kept, instead of the caches of huggingface_hub and FoloVLLM.

    Raises:
        ValueError: `model` is none of these, or `load_format` or `revision` does not fit it.
    """
    check_choice("load_format", load_format, LOAD_FORMATS)
    other = None
    if tokenizer is not None and tokenizer != model:
        try:
            other = resolve_model_source(tokenizer, load_format="auto", download_dir=download_dir)
        except ValueError as error:
            raise ValueError(f"tokenizer={tokenizer!r}: {error}") from error
    source = _resolve(model, revision, other, download_dir)
    _check_format(source, load_format)
    return source


def _resolve(
    model: str, revision: str | None, tokenizer_source: ModelSource | None, download_dir: str | None
) -> ModelSource:
    from folovllm.model_executor.model_loader.named import is_named_model

    if not model.strip():
        raise ValueError(f"model={model!r} is empty. {ALTERNATIVES}")
    path = Path(os.path.expanduser(model))
    # os.path, unlike Path, takes a string that can be no path at all for a file that is not there.
    is_file, is_folder = os.path.isfile(path), os.path.isdir(path)
    named = is_named_model(model)
    if revision is not None and (named or is_file or is_folder):
        raise ValueError(
            f"revision={revision!r} applies to Hugging Face hub ids only, and model={model!r} is "
            f"{'a built-in name' if named else 'local'}: leave revision out."
        )
    if named or path.suffix.lower() == ".gguf":
        from folovllm.model_executor.model_loader.gguf_source import GGUFSource

        if not (named or is_file):
            raise ValueError(f"model={model!r}: no such file. {ALTERNATIVES}")
        return GGUFSource(model, None if named else path, tokenizer_source, download_dir)
    if is_folder:
        from folovllm.model_executor.model_loader.hf_folder import FolderSource

        return FolderSource(model, path, tokenizer_source)
    if is_file:
        raise ValueError(
            f"model={model!r} is a file but no .gguf file. For safetensors give the folder that holds it "
            "together with config.json; pickle weights (.bin, .pt, .pth) are refused, convert them to "
            "safetensors."
        )
    if _HUB_ID.fullmatch(model) is None:
        raise ValueError(
            f"model={model!r}: no such file or folder, and not a hub id ('organisation/name'). {ALTERNATIVES}"
        )
    from folovllm.model_executor.model_loader.hub import HubSource

    return HubSource(model, revision, tokenizer_source, download_dir)


def _check_format(source: ModelSource, load_format: str) -> None:
    """Refuse a load_format that contradicts what the model string turned out to be."""
    from folovllm.model_executor.model_loader.hf_folder import FolderSource

    actual = "safetensors" if isinstance(source, FolderSource) else "gguf"
    if load_format not in ("auto", "dummy", actual):
        raise ValueError(
            f"load_format={load_format!r} does not fit model={source.name!r}, whose weights are {actual}: "
            f"use load_format='auto' or {actual!r}."
        )
