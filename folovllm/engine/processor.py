"""Processor: a prompt and parameters become a checked request (vLLM: `v1/engine/input_processor.py`).

The only place where a user's request is checked against the model. What passes can run; what cannot is
refused here, before anything is queued.
"""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from folovllm.config import VllmConfig
from folovllm.request import EngineCoreRequest
from folovllm.sampling_params import SamplingParams, StructuredOutputsParams
from folovllm.structured_output.backend_xgrammar import validate
from folovllm.utils.common import cdiv, pack_token_ids

PromptType: TypeAlias = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, or a dict of PROMPT_KEYS; see Processor.process_inputs."""
PROMPT_KEYS = ("prompt", "prompt_token_ids", "cache_salt")
# generation_config.json's names -> ours.
DEFAULT_PARAMS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def check_fits(request: EngineCoreRequest, num_blocks: int, block_size: int) -> None:
    """Raise ValueError if a pool of `num_blocks` blocks, the null block included, could never hold the request.

    Of a request at least the prompt and one token more must fit.
    """
    needed, usable = cdiv(len(request.prompt_token_ids) + 1, block_size), num_blocks - 1
    if needed > usable:
        raise ValueError(
            f"prompt of {len(request.prompt_token_ids)} tokens needs {needed} KV cache blocks of {block_size} "
            f"tokens, and the cache has {usable}. Shorten it, or raise kv_cache_memory_bytes, "
            "gpu_memory_utilization or num_gpu_blocks_override."
        )


class Processor:
    """Makes EngineCoreRequests. Stateless but for the generator of seeds."""

    def __init__(self, vllm_config: VllmConfig, tokenizer: Any, generation_config: Mapping[str, Any]) -> None:
        """Make the processor of one engine.

        Args:
            vllm_config: what requests are checked against.
            tokenizer: a transformers tokenizer; None: prompts must be token ids, outputs have no text.
            generation_config: the model's generation_config.json, {} without one. Its end-of-sequence ids
                always count; its sampling defaults only with ModelConfig.generation_config="auto".
        """
        model_config = vllm_config.model_config
        assert model_config.max_model_len is not None
        self.vllm_config = vllm_config
        self.tokenizer = tokenizer
        self.max_model_len = model_config.max_model_len
        self.vocab_size = model_config.get_vocab_size()
        self.max_logprobs = model_config.max_logprobs
        self.generation_config = dict(generation_config)
        # Ids that the model has no logits for can end nothing, and must not reach code that indexes by them.
        eos = self.generation_config.pop("eos_token_id", None)
        if eos is not None:
            ids = [eos] if isinstance(eos, int) else list(eos)
            self.generation_config["eos_token_id"] = [i for i in ids if 0 <= i < self.vocab_size]
        eos = getattr(tokenizer, "eos_token_id", None)
        self.eos_token_id: int | None = eos if eos is not None and 0 <= eos < self.vocab_size else None
        self._seeds = random.Random(model_config.seed)

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the parameters of a request that gives none: the model's own defaults over SamplingParams'.

        Raises:
            ValueError: generation_config.json holds a value that SamplingParams refuses.
        """
        if self.vllm_config.model_config.generation_config == "vllm":
            return SamplingParams()
        given = {
            ours: self.generation_config[theirs]
            for theirs, ours in DEFAULT_PARAMS.items()
            if self.generation_config.get(theirs) is not None
        }
        try:
            return SamplingParams(**given)
        except ValueError as error:
            raise ValueError(
                f"The model's generation_config.json: {error} Pass SamplingParams, or set generation_config='vllm'."
            ) from error

    def process_inputs(
        self,
        request_id: str,
        prompt: PromptType,
        params: SamplingParams | None = None,
        arrival_time: float | None = None,
        priority: int = 0,
        add_special_tokens: bool = True,
    ) -> tuple[str | None, EngineCoreRequest]:
        """Check a request and translate it. Nothing is queued, and nothing the caller owns is changed.

        Args:
            request_id: unique among unfinished requests.
            prompt: text, a list of token ids, or a dict: {"prompt": text} or {"prompt_token_ids": ids}, whose
                "prompt", if there, is only shown; both may have "cache_salt": only requests of the same salt
                share cached blocks.
            params: None means get_default_sampling_params(). With detokenize=True but no tokenizer, outputs
                have the text "".
            arrival_time: wall-clock seconds; None means now.
            priority: smaller runs first; other than 0 only under the priority policy.
            add_special_tokens: let the tokenizer add its own (the beginning-of-sequence token) to a text;
                False where a chat template has put them there.

        Returns:
            The prompt's text (None where it was token ids alone) and the request.

        Raises:
            ValueError: something cannot run; the message names field, value, range and remedy.
            TypeError: `params` is no SamplingParams, or `request_id` no string.
        """
        if not isinstance(request_id, str):
            raise TypeError(f"request_id must be a str, got {type(request_id).__name__}.")
        self._check_priority(priority)
        text, token_ids, cache_salt = self._parse_prompt(prompt)
        # Replaced, not only copied: parameters are mutable, so they are checked again.
        params = self.get_default_sampling_params() if params is None else _checked_copy(params)
        self._check_params(params)
        if token_ids is None:
            assert text is not None
            token_ids = self._tokenize(text, add_special_tokens)
        self._check_prompt_ids(token_ids)
        self._complete_params(params, len(token_ids))
        request = EngineCoreRequest(
            request_id=request_id,
            prompt_token_ids=token_ids,
            sampling_params=params,
            arrival_time=time.time() if arrival_time is None else arrival_time,
            external_req_id=request_id,
            priority=priority,
            cache_salt=cache_salt,
        )
        return text, request

    def _check_priority(self, priority: int) -> None:
        if not isinstance(priority, int) or isinstance(priority, bool):
            raise ValueError(f"priority={priority!r} must be an int; smaller runs first.")
        if priority != 0 and self.vllm_config.scheduler_config.policy != "priority":
            raise ValueError(
                f"priority={priority} has no effect under the scheduling policy 'fcfs': leave it 0, or start "
                "the engine with scheduling_policy='priority'."
            )

    def _parse_prompt(self, prompt: PromptType) -> tuple[str | None, list[int] | None, str | None]:
        """Return (text, token ids, cache salt) of a prompt in any of its forms; text or ids may be None."""
        if isinstance(prompt, str):
            prompt = {"prompt": prompt}
        elif isinstance(prompt, (list, tuple)):
            prompt = {"prompt_token_ids": prompt}
        elif not isinstance(prompt, Mapping):
            raise ValueError(
                f"prompt is a {type(prompt).__name__}; give a str, a list of token ids, or a dict with "
                "'prompt' or 'prompt_token_ids'."
            )
        unknown = [key for key in prompt if key not in PROMPT_KEYS]
        if unknown:
            raise ValueError(
                f"prompt: unsupported {', '.join(map(repr, unknown))}; a prompt may have "
                f"{', '.join(map(repr, PROMPT_KEYS))}. FoloVLLM takes text and token ids only."
            )
        text, token_ids, salt = (prompt.get(key) for key in PROMPT_KEYS)
        if text is None and token_ids is None:
            raise ValueError("prompt has neither 'prompt' (text) nor 'prompt_token_ids'; give one of them.")
        if text is not None and not isinstance(text, str):
            raise ValueError(f"prompt text is a {type(text).__name__}; it must be a str.")
        if salt is not None and (not isinstance(salt, str) or not salt):
            raise ValueError(f"cache_salt={salt!r} must be a non-empty str; leave it out to share with all.")
        if token_ids is not None:
            if not isinstance(token_ids, (list, tuple)):
                raise ValueError(f"prompt_token_ids is a {type(token_ids).__name__}; give a list of ints.")
            token_ids = list(token_ids)
        return text, token_ids, salt

    def _tokenize(self, text: str, add_special_tokens: bool) -> list[int]:
        if not text:
            raise ValueError("prompt is empty (''); it must give at least one token.")
        if self.tokenizer is None:
            raise ValueError(
                "prompt is text, but the engine has no tokenizer (skip_tokenizer_init=True): "
                "give {'prompt_token_ids': [...]}."
            )
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"prompt holds {text[error.start]!r} at character {error.start}: half of a surrogate pair is "
                "no character. Remove it."
            ) from error
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens).input_ids)

    def _check_prompt_ids(self, token_ids: list[int]) -> None:
        """Refuse prompts that are empty, too long, or not made of the model's tokens."""
        if not token_ids:
            raise ValueError("prompt is empty: it must have at least one token.")
        limit = self.max_model_len - 1
        if len(token_ids) > limit:
            raise ValueError(
                f"prompt has {len(token_ids)} tokens; at most max_model_len - 1 = {limit} fit, since one "
                "must be left for the output. Shorten it, or raise max_model_len if the model allows."
            )
        self._check_token_ids("prompt_token_ids", token_ids, "Is this the model's own tokenizer?")

    def _check_token_ids(self, name: str, token_ids: Iterable[Any], remedy: str) -> None:
        """Raise unless all are ints in [0, V)."""
        ids = list(token_ids)
        if not ids:
            return
        packed = pack_token_ids(ids, "I") if set(map(type, ids)) == {int} else None
        if packed is not None and np.frombuffer(packed, dtype="<u4").max() < self.vocab_size:
            return
        for i, value in enumerate(ids):
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(
                    f"{name}[{i}]={value!r} is a {type(value).__name__}; token ids are ints (use .tolist())."
                )
            if not 0 <= value < self.vocab_size:
                raise ValueError(
                    f"{name}[{i}]={value} is outside the vocabulary: token ids are in "
                    f"[0, {self.vocab_size - 1}]. {remedy}"
                )

    def _check_params(self, params: SamplingParams) -> None:
        """Check what SamplingParams cannot check by itself: ids, limits, and what needs a tokenizer."""
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            self._check_token_ids(name, getattr(params, name) or (), "Remove it.")
        for name in ("logprobs", "prompt_logprobs"):
            self._check_num_logprobs(name, getattr(params, name))
        if params.structured_outputs is not None and self.tokenizer is not None:
            params.structured_outputs = _checked_structured_outputs(params.structured_outputs)
        if self.tokenizer is None:
            for name in ("stop", "bad_words", "structured_outputs"):
                if getattr(params, name):
                    raise ValueError(
                        f"{name}={getattr(params, name)!r} needs a tokenizer, and the engine has none "
                        "(skip_tokenizer_init=True). Use stop_token_ids, or logit_bias, instead."
                    )

    def _check_num_logprobs(self, name: str, value: int | None) -> None:
        if value is None:
            return
        limit = self.vocab_size if self.max_logprobs == -1 else min(self.max_logprobs, self.vocab_size)
        if (self.vocab_size if value == -1 else value) > limit:
            raise ValueError(
                f"{name}={value} exceeds what the engine allows: at most {limit} (-1 asks for all "
                f"{self.vocab_size} tokens). Lower it, or start the engine with a larger max_logprobs "
                "(-1: no limit)."
            )

    def _complete_params(self, params: SamplingParams, prompt_len: int) -> None:
        """Fill in what follows from model, tokenizer and prompt. `params` is our own copy."""
        room = self.max_model_len - prompt_len
        if params.min_tokens > room:
            raise ValueError(
                f"min_tokens={params.min_tokens} cannot be reached: after a prompt of {prompt_len} tokens, "
                f"max_model_len={self.max_model_len} leaves {room}. Lower it, or shorten the prompt."
            )
        if params.max_tokens is None:
            params.max_tokens = room
        params.update_from_generation_config(self.generation_config, self.eos_token_id)
        if self.tokenizer is not None:
            params.update_from_tokenizer(self.tokenizer)
            for ids in params.bad_words_token_ids or ():
                self._check_token_ids("bad_words", ids, "Is this the model's own tokenizer?")
        if params.seed is None:
            params.seed = self._seeds.getrandbits(63)


def _checked_structured_outputs(params: StructuredOutputsParams) -> StructuredOutputsParams:
    """Return a copy whose schema is text; ValueError if it cannot be compiled, which takes milliseconds to find out.

    The first time seconds: xgrammar is imported.
    """
    params = dataclasses.replace(params)
    validate(params)
    if isinstance(params.json, dict):
        params.json = json.dumps(params.json)
    return params


def _checked_copy(params: SamplingParams) -> SamplingParams:
    """Return an independent copy of `params`; ValueError if it was changed to something invalid."""
    if not isinstance(params, SamplingParams):
        raise TypeError(f"params must be a SamplingParams, got {type(params).__name__}.")
    return dataclasses.replace(params.clone())
