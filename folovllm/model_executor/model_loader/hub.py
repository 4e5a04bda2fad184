"""A Hugging Face hub id: fetch only the files that are needed, then treat them as a local folder.

vLLM: `model_loader/weight_utils.py::download_weights_from_hf`. Config and tokenizer come first and the weights only
when they are asked for, so that an unsupported or refused model fails before gigabytes arrive. `huggingface_hub`
itself honours HF_HUB_OFFLINE, HF_ENDPOINT, HF_HOME and HF_TOKEN.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from folovllm.model_executor.model_loader.hf_folder import INDEX_FILE, QUANTIZE_FILE, FolderSource
from folovllm.model_executor.model_loader.source import ALTERNATIVES, ModelSource

SMALL_FILES = [
    "config.json",
    "generation_config.json",
    QUANTIZE_FILE,
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tekken.json",
    "chat_template*",
]
WEIGHT_FILES = ["*.safetensors", INDEX_FILE]
# Sub-folders and "consolidated" files hold the same weights in another layout; patterns match "/" too.
IGNORED_FILES = ["*/*", "consolidated*", "adapter_model*"]


class HubSource(FolderSource):
    """A repository on the hub, at one revision."""

    def __init__(
        self,
        name: str,
        revision: str | None = None,
        tokenizer_source: ModelSource | None = None,
        download_dir: str | None = None,
    ) -> None:
        super().__init__(name, Path(), tokenizer_source)
        self._revision = revision
        self._download_dir = download_dir

    @property
    def folder(self) -> Path:
        """The snapshot with config and tokenizer files, downloaded on first use."""
        return self._small_files

    @property
    def weight_folder(self) -> Path:
        """The same snapshot with the weights too, downloaded on first use."""
        return self._weight_files

    @cached_property
    def _small_files(self) -> Path:
        return self._download(SMALL_FILES, self._revision)

    @cached_property
    def _weight_files(self) -> Path:
        # A snapshot's folder is named after its commit: weights must be of the same one as the config.
        return self._download([*SMALL_FILES, *WEIGHT_FILES], self._small_files.name)

    def _download(self, patterns: list[str], revision: str | None) -> Path:
        """Return the local snapshot holding the files that match `patterns`. Raises ValueError."""
        from huggingface_hub import snapshot_download

        try:
            folder = snapshot_download(
                self.name,
                revision=revision,
                cache_dir=self._download_dir,
                allow_patterns=patterns,
                ignore_patterns=IGNORED_FILES,
            )
        except Exception as error:  # its network back end decides what is raised
            at = f" at revision {self._revision!r}" if self._revision else ""
            reason = str(error).strip().split("\n")[0]
            raise ValueError(
                f"model={self.name!r}{at} is no local file or folder and cannot be fetched from the Hugging "
                f"Face hub ({type(error).__name__}: {reason}). {ALTERNATIVES}"
            ) from error
        return Path(folder)
