"""The token ids that GPTQ is tuned on: a text of the user's, or one that the model writes itself.

GPTQ needs to know which input channels are large and which go together; ordinary text shows that. A model's own
text, drawn at temperature 1 from a random first token, looks like what it was trained on, and needs no download
(LLM-QAT, Liu et al. 2023, does the same).
"""

from __future__ import annotations

import gc
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from folovllm.engine.arg_utils import EngineArgs
from folovllm.engine.llm_engine import LLMEngine
from folovllm.sampling_params import RequestOutputKind, SamplingParams

MAX_NUM_SEQS = 64
"""Sequences that are written at once."""


def read_text_file(path: str, what: str) -> str:
    """Return the content of the UTF-8 file `path`; ValueError names `what` it was for."""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{what}={path!r} is no readable UTF-8 text file: {error}") from error


def samples_from_text(text: str, tokenizer: Any, num_samples: int, seq_len: int) -> torch.Tensor:
    """Return sequences [S, seq_len] int64 cut out of `text`, evenly spread over it, S <= num_samples.

    Fewer than num_samples if the text has no more whole sequences; they never overlap.

    Raises:
        ValueError: the text is shorter than one sequence.
    """
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    available = len(token_ids) // seq_len
    if available == 0:
        raise ValueError(
            f"The calibration text has {len(token_ids)} tokens, less than one sequence of seq_len={seq_len}: give a "
            "longer text, or lower seq_len."
        )
    count = min(num_samples, available)
    starts = [i * available // count * seq_len for i in range(count)]
    return torch.tensor([token_ids[start : start + seq_len] for start in starts])


def samples_from_model(
    engine_args: EngineArgs,
    num_samples: int,
    seq_len: int,
    seed: int,
    special_ids: Collection[int] = (),
    use_tqdm: bool = True,
) -> torch.Tensor:
    """Return sequences [num_samples, seq_len] int64 that the model writes at temperature 1.

    The whole model is loaded for this, and freed at the end.

    Args:
        engine_args: which model, and where to run; limits of length and batch are set here.
        num_samples: S.
        seq_len: tokens of each, the first one included.
        seed: decides the first tokens and the draws.
        special_ids: tokens that no text begins with.
        use_tqdm: show a progress bar.
    """
    limits: dict[str, Any] = {"max_model_len": seq_len, "max_num_seqs": min(num_samples, MAX_NUM_SEQS)}
    limits |= {"enable_prefix_caching": False, "skip_tokenizer_init": True, "use_tqdm_on_load": use_tqdm}
    engine = LLMEngine.from_engine_args(replace(engine_args, **limits))
    try:
        vocab_size = engine.vllm_config.model_config.get_vocab_size()
        excluded = set(special_ids)
        usable = torch.tensor([i for i in range(vocab_size) if i not in excluded])
        generator = torch.Generator().manual_seed(seed)
        first = usable[torch.randint(len(usable), (num_samples,), generator=generator)].tolist()
        return _continue(engine, first, seq_len, seed, use_tqdm)
    finally:
        engine.shutdown()
        del engine
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _continue(engine: LLMEngine, first: list[int], seq_len: int, seed: int, use_tqdm: bool) -> torch.Tensor:
    """Return [S, seq_len]: a text for each first token, written by the engine's model."""
    for i, token_id in enumerate(first):
        params = SamplingParams(
            temperature=1.0,
            max_tokens=seq_len - 1,
            ignore_eos=True,  # after the end of one text the model begins another
            seed=seed + i,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        engine.add_request(str(i), {"prompt_token_ids": [token_id]}, params)
    samples: dict[int, list[int]] = {}
    with tqdm(total=len(first), desc="Writing calibration text", unit="sample", disable=not use_tqdm) as bar:
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    index = int(output.request_id)
                    samples[index] = [first[index], *output.outputs[0].token_ids]
                    bar.update(1)
    return torch.tensor([samples[i] for i in range(len(first))])
