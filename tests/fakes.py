"""A tokenizer and an executor without a model: engine tests need neither weights nor torch.

FakeTokenizer: bytes and a few words; every text survives encode and decode, and a character may span tokens.
FakeExecutor: the next token is a function of the whole context (`next_token`), so that a mistake in the
scheduler shows as a different token. It sees only what a worker sees, keeps a KV cache in which every slot
holds a digest of the prefix it stands for, and reads it back through the block tables at every step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from folovllm.kv_cache_interface import FullAttentionSpec, KVCacheConfig
from folovllm.outputs import LogprobsLists, LogprobsTensors, ModelRunnerOutput

WORDS = (" the", " and", "ing", "he", "ll", "lo", " wo", "rld", "stop", "\n\n", " 日", "é")


class Encoding(dict):
    """What calling a tokenizer gives: `.input_ids` or ["input_ids"]."""

    @property
    def input_ids(self) -> list[int]:
        """Token ids."""
        return self["input_ids"]


class FakeTokenizer:
    """Ids 0 to 3 are special (<bos>, <eos>, <pad>, <end>), then 256 single bytes, then `words`.

    `encode` is greedy: at every place the longest word, else a byte.
    """

    special = ("<bos>", "<eos>", "<pad>", "<end>")
    bos_token_id, eos_token_id, pad_token_id, end_token_id = range(4)
    first_byte = 4
    is_fast = False
    name_or_path = "fake"

    def __init__(self, words: Sequence[str | bytes] = WORDS, chat_template: str | None = "fake") -> None:
        """`words`: tokens of more than one byte, which need not be whole characters."""
        self.words = tuple(words)
        self.chat_template = chat_template
        # Bytes of each id; special tokens are written as their names.
        self.pieces = [s.encode() for s in self.special]
        self.pieces += [bytes([b]) for b in range(256)]
        self.pieces += [w if isinstance(w, bytes) else w.encode() for w in self.words]
        first_word = self.first_byte + 256
        by_length = sorted(range(len(self.words)), key=lambda i: -len(self.pieces[first_word + i]))
        self._longest_first = [(self.pieces[first_word + i], first_word + i) for i in by_length]

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.pieces)

    def __len__(self) -> int:
        return len(self.pieces)

    @property
    def eos_token(self) -> str:
        """Text of the end-of-sequence token."""
        return self.special[self.eos_token_id]

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of the special tokens."""
        return list(range(len(self.special)))

    @property
    def all_special_tokens(self) -> list[str]:
        """Texts of the special tokens."""
        return list(self.special)

    def get_vocab(self) -> dict[str, int]:
        """Token -> id; single bytes are written <0xNN>."""
        return {self.convert_ids_to_tokens(i): i for i in range(len(self))}

    def get_added_vocab(self) -> dict[str, int]:
        """Special tokens -> id."""
        return {token: i for i, token in enumerate(self.special)}

    def convert_ids_to_tokens(self, ids: int | Sequence[int], skip_special_tokens: bool = False) -> Any:
        """Return the token(s)."""
        if isinstance(ids, int):
            in_bytes = self.first_byte <= ids < self.first_byte + 256
            return f"<0x{ids - self.first_byte:02X}>" if in_bytes else self.pieces[ids].decode(errors="replace")
        kept = [i for i in ids if not (skip_special_tokens and i < self.first_byte)]
        return [self.convert_ids_to_tokens(i) for i in kept]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Return the id(s)."""
        vocab = self.get_vocab()
        return vocab[tokens] if isinstance(tokens, str) else [vocab[token] for token in tokens]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of `text`, after <bos> with `add_special_tokens`; "<eos>" in it is plain text."""
        data, ids, at = text.encode(), [], 0
        while at < len(data):
            words = (token_id for piece, token_id in self._longest_first if data.startswith(piece, at))
            ids.append(next(words, self.first_byte + data[at]))
            at += len(self.pieces[ids[-1]])
        return [self.bos_token_id, *ids] if add_special_tokens else ids

    def __call__(self, text: str, add_special_tokens: bool = True) -> Encoding:
        return Encoding(input_ids=self.encode(text, add_special_tokens))

    def decode(self, token_ids: int | Iterable[int], skip_special_tokens: bool = False) -> str:
        """Return the text; bytes that are no UTF-8 become U+FFFD, ids outside the vocabulary nothing."""
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        kept = [i for i in ids if i < len(self) and not (skip_special_tokens and i < self.first_byte)]
        return b"".join(self.pieces[i] for i in kept).decode(errors="replace")

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Write "role: content" lines, each ended by <end>; as text or, with `tokenize`, as ids."""
        turns = [f"{m['role']}: {m['content']}" for m in conversation]
        text = "".join(f"{turn}<end>\n" for turn in turns[:-1]) + turns[-1]
        if not continue_final_message:
            text += "<end>\n" + ("assistant: " if add_generation_prompt else "")
        return self.encode(text) if tokenize else text


def next_token(context: Sequence[int], vocab_size: int, forbidden: Iterable[int] = ()) -> int:
    """Return the token that follows `context`: a function of all of it, and never one of `forbidden`."""
    token = (sum(context) + 31 * context[-1] + len(context)) % vocab_size
    banned = set(forbidden)
    while token in banned:
        token = (token + 1) % vocab_size
    return token


def expected_tokens(prompt: Sequence[int], count: int, vocab_size: int, forbidden: Iterable[int] = ()) -> list[int]:
    """Return the `count` tokens that a request alone would get from a FakeExecutor: the ground truth."""
    context = list(prompt)
    for _ in range(count):
        context.append(next_token(context, vocab_size, forbidden))
    return context[len(prompt) :]


@dataclass
class _WorkerRequest:
    """What a worker remembers of a request."""

    token_ids: list[int]
    num_prompt_tokens: int
    params: Any
    block_ids: list[int]
    num_computed_tokens: int
    prompt_logprobs_sent: bool = field(default=False)


class FakeExecutor:
    """Runs steps without a model, through the interface of folovllm.executor.abstract.Executor.

    It fails an assertion whenever the scheduler's messages and the worker's view disagree: tokens beyond the
    known ones, positions without a block, a gap in what was computed, a block that holds another prefix.
    """

    def __init__(
        self,
        vocab_size: int,
        num_layers: int = 1,
        block_size: int = 16,
        memory_bytes: int = 1 << 20,
        forbidden: Iterable[int] = (),
        choose: Callable[[Sequence[int]], int] | None = None,
        step_seconds: float = 0.0,
    ) -> None:
        """Make an executor.

        Args:
            vocab_size: V; tokens are in [0, V).
            num_layers: entries of the cache spec.
            block_size: tokens per block, as in CacheConfig.
            memory_bytes: what determine_available_memory reports; a block takes 4 * block_size per layer.
            forbidden: tokens that never come, for instance the end-of-sequence ids.
            choose: context -> next token, in place of `next_token`.
            step_seconds: pretended time of a step.
        """
        self.vocab_size = vocab_size
        self.num_layers = num_layers
        self.block_size = block_size
        self.memory_bytes = memory_bytes
        self.step_seconds = step_seconds
        banned = frozenset(forbidden)
        self.choose = choose or (lambda context: next_token(context, vocab_size, banned))
        self.requests: dict[str, _WorkerRequest] = {}
        # Block id -> what its slots stand for: a digest of all tokens up to and including the slot's.
        self.kv_cache: dict[int, list[int | None]] = {}
        self.num_blocks = 0
        self.scheduled: list[dict[str, int]] = []
        """num_scheduled_tokens of every step."""
        self.is_shut_down = False

    def get_kv_cache_specs(self) -> list[dict[str, FullAttentionSpec]]:
        """Return the specs of one worker."""
        spec = FullAttentionSpec(self.block_size, num_kv_heads=1, head_size=1, dtype=np.dtype("float16"))
        return [{f"layers.{i}": spec for i in range(self.num_layers)}]

    def determine_available_memory(self) -> list[int]:
        """Return the bytes of one worker."""
        return [self.memory_bytes]

    def initialize_from_config(self, kv_cache_configs: list[KVCacheConfig]) -> None:
        """Allocate the cache."""
        (config,) = kv_cache_configs
        self.num_blocks = config.num_blocks
        self.kv_cache = {i: [None] * self.block_size for i in range(config.num_blocks)}

    def get_startup_info(self) -> SimpleNamespace:
        """Return stand-ins for StartupInfo's fields."""
        return SimpleNamespace(
            device="fake",
            dtype="float16 (fake)",
            attention_backend="fake (fake)",
            weight_bytes=0,
            kv_cache_bytes=self.memory_bytes,
            phase_seconds={"load weights": 0.0},
        )

    def shutdown(self) -> None:
        """Note that it was called."""
        self.is_shut_down = True

    prefers_async_scheduling = False

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> ModelRunnerOutput:
        """Run one step."""
        if self.step_seconds:
            time.sleep(self.step_seconds)
        self._update_states(scheduler_output)
        scheduled = scheduler_output.num_scheduled_tokens
        assert scheduler_output.total_num_scheduled_tokens == sum(scheduled.values())
        if scheduled:
            self.scheduled.append(dict(scheduled))
        sampled: list[list[int]] = []
        prompt_logprobs: dict[str, LogprobsTensors | None] = {}
        for req_id, num_tokens in scheduled.items():
            request = self.requests[req_id]
            start, end = request.num_computed_tokens, request.num_computed_tokens + num_tokens
            known = len(request.token_ids)
            assert start < end <= known, f"{req_id}: tokens {start} to {end}, {known} known"
            self._compute(req_id, request, start, end)
            request.num_computed_tokens = end
            if end < known:
                sampled.append([])
                continue
            if request.params is not None and request.params.prompt_logprobs is not None:
                self._add_prompt_logprobs(req_id, request, prompt_logprobs)
            sampled.append([self.choose(request.token_ids)])
            request.token_ids.append(sampled[-1][0])
        req_ids = list(scheduled)
        return ModelRunnerOutput(
            req_ids=req_ids,
            req_id_to_index={req_id: i for i, req_id in enumerate(req_ids)},
            sampled_token_ids=sampled,
            logprobs=self._logprobs(req_ids, sampled),
            prompt_logprobs_dict=prompt_logprobs,
        )

    def _update_states(self, scheduler_output: Any) -> None:
        for req_id in scheduler_output.finished_req_ids:
            self.requests.pop(req_id, None)
        for new in scheduler_output.scheduled_new_reqs:
            assert new.req_id not in self.requests, f"{new.req_id} is new, but was known"
            self.requests[new.req_id] = _WorkerRequest(
                token_ids=list(new.prompt_token_ids),
                num_prompt_tokens=len(new.prompt_token_ids),
                params=getattr(new, "sampling_params", None),
                block_ids=list(new.block_ids[0]),
                num_computed_tokens=new.num_computed_tokens,
            )
        cached = scheduler_output.scheduled_cached_reqs
        for i, req_id in enumerate(cached.req_ids):
            request, new_block_ids = self.requests[req_id], cached.new_block_ids[i]
            if req_id in cached.resumed_req_ids:
                assert new_block_ids is not None, f"{req_id}: resumed without blocks"
                request.block_ids = list(new_block_ids[0])
                if req_id in cached.all_token_ids:
                    # With look-ahead the scheduler may have thrown away tokens that the worker drew.
                    tokens = list(cached.all_token_ids[req_id])
                    assert tokens == request.token_ids[: len(tokens)], f"{req_id}: resumed with other tokens"
                    request.token_ids = tokens
                request.num_computed_tokens = cached.num_computed_tokens[i]
            else:
                if new_block_ids is not None:
                    request.block_ids.extend(new_block_ids[0])
                assert cached.num_computed_tokens[i] == request.num_computed_tokens, f"{req_id}: a gap"

    def _compute(self, req_id: str, request: _WorkerRequest, start: int, end: int) -> None:
        """Write the slots of positions [start, end); check that those before hold this request's prefix."""
        blocks = request.block_ids
        assert len(blocks) * self.block_size >= end, f"{req_id}: {len(blocks)} blocks for {end} tokens"
        assert 0 not in blocks, f"{req_id}: holds the null block"
        assert len(set(blocks)) == len(blocks), f"{req_id}: holds a block twice"
        digest = 0
        for position in range(end):
            digest = hash((digest, request.token_ids[position]))
            slots, offset = self.kv_cache[blocks[position // self.block_size]], position % self.block_size
            if position >= start:
                slots[offset] = digest
            else:
                assert slots[offset] == digest, f"{req_id}: position {position} holds another prefix"

    def _logprobs(self, req_ids: list[str], sampled: list[list[int]]) -> LogprobsLists | None:
        """Return rows as wide as the request that asks for most; None if none asks."""
        asked = [getattr(self.requests[r].params, "logprobs", None) for r in req_ids]
        if all(k is None for k in asked):
            return None
        width = max(self.vocab_size if k == -1 else k for k in asked if k is not None)
        return LogprobsLists(*_fake_rows([tokens[0] if tokens else 0 for tokens in sampled], width, self.vocab_size))

    def _add_prompt_logprobs(
        self, req_id: str, request: _WorkerRequest, into: dict[str, LogprobsTensors | None]
    ) -> None:
        if request.prompt_logprobs_sent:
            return
        request.prompt_logprobs_sent = True
        wanted = request.params.prompt_logprobs
        width = self.vocab_size if wanted == -1 else wanted
        prompt = request.token_ids[1 : request.num_prompt_tokens]
        # Arrays instead of tensors: both have tolist(), and this file does without torch.
        into[req_id] = LogprobsTensors(*_fake_rows(prompt, width, self.vocab_size))


def _fake_rows(chosen: Sequence[int], width: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ids and log probabilities, [n, width + 1], and ranks [n]: the best tokens are 0, 1, 2, ..."""
    ids = np.array([[c, *range(width)] for c in chosen], dtype=np.int64).reshape(len(chosen), width + 1)
    logprobs = -0.5 - ids.astype(np.float32) / vocab_size
    return ids, logprobs, np.array(chosen, dtype=np.int64) + 1
