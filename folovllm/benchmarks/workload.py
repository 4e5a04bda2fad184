"""What is asked of an engine: requests as token ids, each with a condition for its arrival. Torch-free.

A request arrives at the start, or once another one has written so many tokens, never at a time of the clock: so a fast
and a slow engine get the same work in the same order. A request can also go on where another has ended, which makes a
conversation. Token ids are random, drawn from a seed: equal ones for every engine of a round, new ones in the next.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from folovllm.utils.common import check_range

WARM_UP_SEED = 1 << 20
"""Of the token ids of untimed requests: no round and no iteration draws these."""
LOWEST_TOKEN_ID = 100
"""Ids below are special tokens in many vocabularies."""


@dataclass(frozen=True)
class BenchRequest:
    """One request."""

    id: str
    """Unique in its workload."""
    token_ids: list[int]
    """The prompt, or what it adds to the conversation `follows`."""
    max_tokens: int
    """Output tokens: exactly so many, the end-of-sequence token is ignored."""
    group: str = "all"
    """Requests whose latencies are looked at together."""
    after: str | None = None
    """Arrives once this request has written `after_tokens` tokens; None: at the start."""
    after_tokens: int = 0
    """See `after`."""
    continues: bool = False
    """The prompt is all of `after`, prompt and output, with `token_ids` behind it."""


@dataclass(frozen=True)
class Workload:
    """Requests that are measured together."""

    name: str
    """Names its figures: "mixed", "arrivals", ..."""
    requests: tuple[BenchRequest, ...]
    """In the order in which those of the start are queued."""

    def __post_init__(self) -> None:
        known: dict[str, BenchRequest] = {}
        for request in self.requests:
            check_range("max_tokens", request.max_tokens, low=1)
            if request.id in known:
                raise ValueError(f"request id={request.id!r} is used twice in workload {self.name!r}.")
            if request.after is not None:
                if request.after not in known:
                    raise ValueError(f"request {request.id!r} comes after {request.after!r}, which is not before it.")
                check_range("after_tokens", request.after_tokens, low=1, high=known[request.after].max_tokens)
                if request.continues and request.after_tokens != known[request.after].max_tokens:
                    raise ValueError(f"request {request.id!r} continues {request.after!r} before it has ended.")
            known[request.id] = request

    def longest(self) -> int:
        """Return the most tokens, prompt and output, that a request has."""
        lengths: dict[str, int] = {}
        for request in self.requests:
            before = lengths[request.after] if request.continues and request.after is not None else 0
            lengths[request.id] = before + len(request.token_ids) + request.max_tokens
        return max(lengths.values())


class TokenSource:
    """Random token ids; equal for equal names and seeds."""

    def __init__(self, vocab_size: int, name: str, seed: int) -> None:
        """Ids are below `vocab_size`, and not below LOWEST_TOKEN_ID where the vocabulary is larger than twice that."""
        self._low = LOWEST_TOKEN_ID if vocab_size > 2 * LOWEST_TOKEN_ID else 0
        self._high = vocab_size
        self.random = random.Random(f"{name}-{seed}")

    def take(self, count: int) -> list[int]:
        """Return `count` ids."""
        return [self.random.randrange(self._low, self._high) for _ in range(count)]


def draw_lengths(count: int, bounds: tuple[int, int], seed: int) -> list[int]:
    """Return `count` lengths, uniform in [low, high]; the same for every round, so that rounds can be compared."""
    generator = random.Random(seed)
    return [generator.randint(*bounds) for _ in range(count)]


def mixed(
    vocab_size: int, seed: int, count: int, input_lens: tuple[int, int], output_lens: tuple[int, int]
) -> Workload:
    """Return `count` requests of all lengths, queued together: what throughput is measured with."""
    tokens = TokenSource(vocab_size, "mixed", seed)
    inputs, outputs = draw_lengths(count, input_lens, 1), draw_lengths(count, output_lens, 2)
    return Workload(
        "mixed",
        tuple(
            BenchRequest(f"mixed-{i}", tokens.take(num_in), num_out)
            for i, (num_in, num_out) in enumerate(zip(inputs, outputs, strict=True))
        ),
    )


def uniform(
    vocab_size: int,
    seed: int,
    count: int,
    input_len: int,
    output_len: int,
    prefix_len: int = 0,
    range_ratio: float = 0.0,
) -> Workload:
    """Return `count` requests, queued together.

    Args:
        vocab_size: token ids are below it.
        seed: of token ids and lengths.
        count: requests.
        input_len: prompt tokens of their own; with range_ratio r, uniform in input_len * (1 - r) to (1 + r).
        output_len: output tokens, likewise.
        prefix_len: further prompt tokens, which all share.
        range_ratio: in [0, 1).
    """
    check_range("range_ratio", range_ratio, low=0.0, high=0.999)
    tokens = TokenSource(vocab_size, "uniform", seed)
    prefix = tokens.take(prefix_len)

    def draw(length: int) -> int:
        bounds = (int(length * (1 - range_ratio)), int(length * (1 + range_ratio)))
        return max(1, tokens.random.randint(*bounds))

    return Workload(
        "uniform",
        tuple(
            BenchRequest(f"uniform-{i}", prefix + tokens.take(draw(input_len)), draw(output_len)) for i in range(count)
        ),
    )


def single(vocab_size: int, seed: int, input_len: int, output_len: int) -> Workload:
    """Return one request alone."""
    tokens = TokenSource(vocab_size, "single", seed)
    return Workload("single", (BenchRequest("single-0", tokens.take(input_len), output_len),))


def arrivals(
    vocab_size: int, seed: int, num_streams: int, num_long: int, long_len: int, input_len: int = 16, gap: int = 8
) -> Workload:
    """Return streams that decode (group "stream") while long prompts (group "long") arrive, `gap` tokens apart.

    The streams go on for two gaps after the last arrival.
    """
    tokens = TokenSource(vocab_size, "arrivals", seed)
    length = (num_long + 2) * gap
    requests = [BenchRequest(f"stream-{i}", tokens.take(input_len), length, "stream") for i in range(num_streams)]
    requests += [
        BenchRequest(f"long-{i}", tokens.take(long_len), 1, "long", after="stream-0", after_tokens=(i + 1) * gap)
        for i in range(num_long)
    ]
    return Workload("arrivals", tuple(requests))


def shared_prefix(vocab_size: int, seed: int, count: int, prefix_len: int, own_len: int, output_len: int) -> Workload:
    """Return requests with a common beginning: one (group "cold"), then the others together (group "warm")."""
    tokens = TokenSource(vocab_size, "shared", seed)
    prefix = tokens.take(prefix_len)
    first = BenchRequest("shared-0", prefix + tokens.take(own_len), output_len, "cold")
    others = (
        BenchRequest(
            f"shared-{i}", prefix + tokens.take(own_len), output_len, "warm", after="shared-0", after_tokens=output_len
        )
        for i in range(1, count)
    )
    return Workload("shared", (first, *others))


def conversations(
    vocab_size: int, seed: int, count: int, turns: int, first_len: int, own_len: int, output_len: int
) -> Workload:
    """Return `count` conversations of `turns` turns: group "first" of each, and "later", which repeat all before."""
    tokens = TokenSource(vocab_size, "chat", seed)
    requests = []
    for i in range(count):
        requests.append(BenchRequest(f"chat-{i}-0", tokens.take(first_len), output_len, "first"))
        for turn in range(1, turns):
            requests.append(
                BenchRequest(
                    f"chat-{i}-{turn}",
                    tokens.take(own_len),
                    output_len,
                    "later",
                    after=f"chat-{i}-{turn - 1}",
                    after_tokens=output_len,
                    continues=True,
                )
            )
    return Workload("chat", tuple(requests))


def total_output(requests: Sequence[BenchRequest]) -> int:
    """Return the output tokens of all."""
    return sum(request.max_tokens for request in requests)
