"""What `folovllm bench serve` asks, and when (vLLM: `benchmarks/datasets/`, `get_request` of `benchmarks/serve.py`).

Everything is drawn from the seed: two servers asked with the same seed get the same requests at the same times.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

from folovllm.benchmarks.serve_client import ServeRequest
from folovllm.benchmarks.workload import TokenSource

# fmt: off
WORDS = [
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world",
    "school", "state", "family", "student", "group", "country", "problem", "hand", "part", "place", "case",
    "week", "company", "system", "program", "question", "work", "government", "number", "night", "point", "home",
    "water", "room", "mother", "area", "money", "story", "fact", "month", "lot", "right", "study",
    "book", "eye", "job", "word", "business", "issue", "side", "kind", "head", "house", "service",
    "friend",
]
# fmt: on
"""A token each in most vocabularies: what a random chat message is made of."""


def draw_length(generator: random.Random, length: int, range_ratio: float) -> int:
    """Return a length in [length * (1 - range_ratio), length * (1 + range_ratio)], at least 1."""
    low, high = math.floor(length * (1 - range_ratio)), math.ceil(length * (1 + range_ratio))
    return max(1, generator.randint(low, high))


class RandomRequests:
    """Prompts of random tokens, some of them after one of a few shared prefixes."""

    def __init__(
        self,
        seed: int,
        *,
        input_len: int,
        output_len: int,
        range_ratio: float = 0.0,
        prefix_len: int = 0,
        num_prefixes: int = 1,
        vocab_size: int = 10_000,
        as_text: bool = False,
    ) -> None:
        """Draw the prefixes.

        Args:
            seed: the same seed, the same requests.
            input_len: tokens of a prompt behind its prefix.
            output_len: most output tokens.
            range_ratio: lengths vary by so much, 0 to 1: see draw_length.
            prefix_len: tokens of a shared prefix.
            num_prefixes: how many there are; requests take turns.
            vocab_size: token ids are below it.
            as_text: words instead of token ids, about one token each.
        """
        self._tokens = TokenSource(vocab_size, "serve", seed)
        self._as_text = as_text
        self._input_len, self._output_len, self._range_ratio = input_len, output_len, range_ratio
        self._prefixes = [self._take(prefix_len) for _ in range(num_prefixes)]

    def _take(self, count: int) -> list[int] | list[str]:
        return self._tokens.random.choices(WORDS, k=count) if self._as_text else self._tokens.take(count)

    def take(self, count: int) -> list[ServeRequest]:
        """Return the next `count` requests."""
        requests = []
        generator = self._tokens.random
        for number in range(count):
            prefix = self._prefixes[number % len(self._prefixes)]
            body = self._take(draw_length(generator, self._input_len, self._range_ratio))
            prompt = [*prefix, *body]
            requests.append(
                ServeRequest(
                    " ".join(str(word) for word in prompt) if self._as_text else [int(token) for token in prompt],
                    draw_length(generator, self._output_len, self._range_ratio),
                )
            )
        return requests


def read_requests(path: str, count: int, output_len: int) -> list[ServeRequest]:
    """Return the first `count` requests of a file of JSON lines, from the start again where it has fewer.

    A line is {"prompt": text} with, if it likes, "output_tokens" (default: `output_len`).

    Raises:
        ValueError: the file cannot be read, or a line is not so.
    """
    try:
        lines = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--dataset-path {path} cannot be read: {error}.") from error
    if not lines:
        raise ValueError(f"--dataset-path {path} is empty.")
    requests = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            prompt, max_tokens = record["prompt"], record.get("output_tokens", output_len)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f'--dataset-path {path}, line {number}: not a JSON object with "prompt".') from error
        if not isinstance(prompt, str) or not isinstance(max_tokens, int) or max_tokens < 1:
            raise ValueError(f'--dataset-path {path}, line {number}: "prompt" is text, "output_tokens" 1 or more.')
        requests.append(ServeRequest(prompt, max_tokens))
    return [requests[i % len(requests)] for i in range(count)]


def arrival_times(request_rate: float, burstiness: float, seed: int) -> Iterator[float]:
    """Yield the seconds, from the start, at which requests arrive, for ever.

    Gaps are drawn from a Gamma distribution of mean 1 / request_rate and shape `burstiness`: 1 makes a Poisson process,
    less comes in bursts, more is more even. A rate of infinity: all at once.
    """
    generator = random.Random(f"arrivals-{seed}")
    time_s = 0.0
    while True:
        yield time_s
        if not math.isinf(request_rate):
            time_s += generator.gammavariate(burstiness, 1 / (request_rate * burstiness))
