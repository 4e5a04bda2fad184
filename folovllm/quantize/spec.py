"""What a quantized checkpoint should be like: checked options, and whether a model's layers can have them.

No torch here, so that the command line can refuse a wrong flag at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from folovllm.utils.common import check_bool, check_choice, check_range

BITS = (4, 8)
GROUP_SIZES = (-1, 32, 64, 128)
METHODS = ("gptq", "rtn")
WORD_BITS = 32


@dataclass(frozen=True)
class QuantizationSpec:
    """How to quantize; every field is an option of `folovllm quantize`."""

    bits: int = 4
    """Of one weight; one of BITS."""
    group_size: int = 128
    """Input channels that share a scale and a zero point; -1: all of them. One of GROUP_SIZES."""
    sym: bool = True
    """The zero point is the middle of the range; False: one per group. vLLM runs symmetric checkpoints only."""
    desc_act: bool = False
    """Quantize the input channels with the largest activations first (act-order); groups are then no neighbours."""
    method: str = "gptq"
    """One of METHODS; "rtn" rounds every weight to the nearest value and needs no calibration."""
    damp_percent: float = 0.01
    """This share of the Hessian's mean diagonal is added to the diagonal."""

    def __post_init__(self) -> None:
        check_choice("bits", self.bits, BITS)
        check_choice("group_size", self.group_size, GROUP_SIZES)
        check_bool("sym", self.sym)
        check_bool("desc_act", self.desc_act)
        check_choice("method", self.method, METHODS)
        check_range("damp_percent", self.damp_percent, low=0.0, high=1.0, open_low=True)
        if self.method == "rtn" and self.desc_act:
            raise ValueError("desc_act=True orders the steps of GPTQ; method='rtn' has none: leave one of them out.")

    @property
    def max_value(self) -> int:
        """Largest stored integer, 2**bits - 1."""
        return int(2**self.bits - 1)

    @property
    def values_per_word(self) -> int:
        """Integers in one 32-bit word."""
        return WORD_BITS // self.bits

    def to_config(self, version: str) -> dict[str, Any]:
        """Return the `quantization_config` of config.json, with the keys that GPTQModel and vLLM read."""
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "desc_act": self.desc_act,
            "sym": self.sym,
            "lm_head": False,
            "damp_percent": self.damp_percent,
            "true_sequential": True,
            "static_groups": False,
            "checkpoint_format": "gptq",
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"folovllm:{version}"], "method": self.method},
        }


def check_sizes(spec: QuantizationSpec, inputs: dict[str, int], outputs: dict[str, int]) -> None:
    """Raise ValueError unless every layer can be cut into groups and packed into words.

    Args:
        spec: what is wanted.
        inputs: what it is -> number of input channels, e.g. {"hidden_size": 576}.
        outputs: the same for output channels.
    """
    for name, size in inputs.items():
        if spec.group_size != -1 and size % spec.group_size:
            fitting = [g for g in GROUP_SIZES if g == -1 or not any(n % g for n in inputs.values())]
            raise ValueError(
                f"group_size={spec.group_size} does not divide {name}={size}. Sizes that divide all layers of this "
                f"model: {', '.join(map(str, fitting))} (-1: one group)."
            )
    for name, size in {**inputs, **outputs}.items():
        if size % spec.values_per_word:
            raise ValueError(
                f"{name}={size} cannot be packed: it is no multiple of {spec.values_per_word}, the {spec.bits}-bit "
                "values in a 32-bit word."
            )
