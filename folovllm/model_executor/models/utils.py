"""From checkpoint names to parameters: fused layers, tied embeddings, one report of all that does not fit.

vLLM: `model_executor/models/utils.py::AutoWeightsLoader` and the `load_weights` loop that each of its models
repeats.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from folovllm.model_executor.model_loader.loader import describe
from folovllm.model_executor.model_loader.weight_utils import InvalidTensor, default_weight_loader

ShardId = int | str
StackedMapping = Sequence[tuple[str, str, ShardId]]


@dataclass
class LoadReport:
    """What became of the tensors of a checkpoint."""

    loaded: set[str] = field(default_factory=set)
    """Parameters that are complete: for fused ones, all shards arrived."""
    num_tensors: int = 0
    """Checkpoint tensors that were copied."""
    missing: list[str] = field(default_factory=list)
    """Checkpoint names of what the model needs and the checkpoint lacks."""
    unexpected: list[str] = field(default_factory=list)
    """Checkpoint names that belong to no parameter."""
    misshaped: list[str] = field(default_factory=list)
    """Checkpoint names with the reason why they do not fit."""
    invalid: list[str] = field(default_factory=list)
    """Checkpoint names with the reason why their contents cannot be used."""
    duplicates: list[str] = field(default_factory=list)
    """Checkpoint names that came more than once."""

    def raise_if_bad(self) -> None:
        """Raise one ValueError that lists everything wrong, if anything is."""
        problems = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of a wrong shape": self.misshaped,
            "unusable": self.invalid,
            "there twice": self.duplicates,
        }
        lines = [describe(f"tensors are {what}", names) for what, names in problems.items() if names]
        if lines:
            raise ValueError(
                "The checkpoint does not fit the model that its config describes:\n  "
                + "\n  ".join(lines)
                + "\nCheck that config and weights belong together and that every file is complete."
            )


def load_named_weights(
    model: nn.Module,
    weights: Iterable[tuple[str, torch.Tensor]],
    stacked_params_mapping: StackedMapping = (),
    *,
    ignore: Sequence[str] = ("rotary_emb.inv_freq",),
    tied: Mapping[str, str] | None = None,
) -> LoadReport:
    """Copy every tensor into the parameter it belongs to, or raise one ValueError listing all that is wrong.

    Args:
        model: its parameters exist in their final dtype and on their final device. A parameter with a
            `weight_loader` attribute is filled by `weight_loader(param, tensor)`, or `weight_loader(param,
            tensor, shard_id)` for a shard of a fused one; others by `default_weight_loader`. A loader raises
            ValueError for a wrong shape, InvalidTensor for contents that cannot be used.
        weights: (checkpoint name, CPU tensor); each is dropped before the next is asked for.
        stacked_params_mapping: (fused module, module in the checkpoint, shard id), e.g. ("qkv_proj",
            "q_proj", "q"). Names match whole dotted parts.
        ignore: tensors whose name contains one of these are skipped: values that the model computes itself.
        tied: parameter -> the parameter it shares storage with, e.g. {"lm_head.weight":
            "model.embed_tokens.weight"}: skipped in the checkpoint, and not missed.

    Returns:
        A report without problems; `loaded` is what `model.load_weights` returns.
    """
    return _NamedWeights(model, stacked_params_mapping, tuple(ignore), tied or {}).load(weights)


class _NamedWeights:
    """The state of one `load_named_weights`."""

    def __init__(
        self, model: nn.Module, stacked: StackedMapping, ignore: tuple[str, ...], tied: Mapping[str, str]
    ) -> None:
        self._params = dict(model.named_parameters(remove_duplicate=False))
        self._stacked = [(f".{fused.strip('.')}.", f".{part.strip('.')}.", i) for fused, part, i in stacked]
        self._ignore = ignore
        self._tied = tied
        self._report = LoadReport()
        self._arrived: dict[str, set[ShardId | None]] = {}  # parameter -> shards; {None} if it came whole

    @torch.no_grad()
    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> LoadReport:
        """Load all, then report."""
        for name, tensor in weights:
            if name not in self._tied and not any(part in name for part in self._ignore):
                self._load_one(name, tensor)
            del tensor  # or it would live on while the next one is read
        self._find_missing()
        self._report.raise_if_bad()
        return self._report

    def _load_one(self, name: str, tensor: torch.Tensor) -> None:
        target, shard = self._target(name)
        param = self._params.get(target)
        if param is None:
            if not self._is_bias_of_nothing(name, tensor):
                self._report.unexpected.append(name)
            return
        arrived = self._arrived.setdefault(target, set())
        if shard in arrived or None in arrived or (shard is None and arrived):
            self._report.duplicates.append(name)
            return
        arrived.add(shard)
        loader: Any = getattr(param, "weight_loader", default_weight_loader)
        try:
            loader(param, tensor, *(() if shard is None else (shard,)))
            self._report.num_tensors += 1
        except InvalidTensor as error:
            self._report.invalid.append(f"{name} ({error})")
        except ValueError as error:
            self._report.misshaped.append(f"{name} ({error})")

    def _target(self, name: str) -> tuple[str, ShardId | None]:
        """Return the parameter that a checkpoint tensor belongs to, and its shard id in a fused one."""
        dotted = f".{name}."
        for fused, part, shard in self._stacked:
            if part in dotted:
                renamed = dotted.replace(part, fused, 1).strip(".")
                if renamed in self._params:
                    return renamed, shard
        return name, None

    def _is_bias_of_nothing(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether this is a bias of zeros beside a GPTQ weight: AutoGPTQ wrote them for layers that have no bias."""
        stem, _, last = name.rpartition(".")
        return last == "bias" and self._target(f"{stem}.qweight")[0] in self._params and not bool(tensor.any())

    def _find_missing(self) -> None:
        """Compare what arrived with what each parameter needs; parameters that share storage need it once."""
        complete = {id(self._params[name]) for name in self._arrived if not self._absent_parts(name)}
        for name, param in self._params.items():
            if id(param) in complete or name in self._tied:
                self._report.loaded.add(name)
            else:
                self._report.missing += self._absent_parts(name)
        self._report.missing = sorted(set(self._report.missing))

    def _absent_parts(self, name: str) -> list[str]:
        """Return the checkpoint names that parameter `name` still needs."""
        arrived = self._arrived.get(name, set())
        dotted = f".{name}."
        parts = {i: dotted.replace(fused, part, 1).strip(".") for fused, part, i in self._stacked if fused in dotted}
        if None in arrived:
            return []
        return [part for shard, part in parts.items() if shard not in arrived] if parts else [name]
