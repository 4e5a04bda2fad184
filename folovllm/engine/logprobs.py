"""Log probabilities as users get them: id -> Logprob for every position (vLLM: `v1/engine/logprobs.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from folovllm.engine.detokenizer import MAX_UNFINISHED, REPLACEMENT
from folovllm.outputs import EngineCoreOutput, Logprob, LogprobsLists, LogprobsTensors
from folovllm.request import EngineCoreRequest


@dataclass
class LogprobsProcessor:
    """Collects the log probabilities of one request."""

    tokenizer: Any
    """None leaves `decoded_token` None."""
    logprobs: list[dict[int, Logprob]] | None
    """Per output token; None unless asked for."""
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    """Per prompt token, the first being None; None unless asked for, [] until they come and once popped."""
    cumulative_logprob: float | None
    """Sum over the output tokens; None unless asked for."""
    num_logprobs: int | None
    """Best tokens wanted per output token; -1: all."""
    num_prompt_logprobs: int | None
    """Best tokens wanted per prompt token; -1: all."""
    _context: list[int] = field(default_factory=list)
    """The last output tokens: those that a character may have begun in."""
    _prompt_context: list[int] = field(default_factory=list)
    """The prompt's first token, which has no log probability itself."""

    @classmethod
    def from_new_request(cls, tokenizer: Any, request: EngineCoreRequest) -> LogprobsProcessor:
        """Return the processor for a request; `tokenizer` may be None."""
        params = request.sampling_params
        prompt = request.prompt_token_ids or []
        # A prompt of one token has no log probabilities to wait for.
        no_prompt_logprobs: list[dict[int, Logprob] | None] = [None] if len(prompt) == 1 else []
        return cls(
            tokenizer=tokenizer,
            logprobs=None if params.logprobs is None else [],
            prompt_logprobs=None if params.prompt_logprobs is None else no_prompt_logprobs,
            cumulative_logprob=None if params.logprobs is None else 0.0,
            num_logprobs=params.logprobs,
            num_prompt_logprobs=params.prompt_logprobs,
            _prompt_context=prompt[:1],
        )

    def update_from_output(self, output: EngineCoreOutput) -> None:
        """Take in one step's log probabilities."""
        if output.new_logprobs is not None:
            self._update_sample_logprobs(output.new_logprobs)
        if output.new_prompt_logprobs_tensors is not None:
            self._update_prompt_logprobs(output.new_prompt_logprobs_tensors)

    def pop_prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        """Return the prompt's log probabilities and forget them: in a stream they are sent once."""
        popped = self.prompt_logprobs
        if popped:
            self.prompt_logprobs = []
        return popped

    def _update_sample_logprobs(self, new: LogprobsLists) -> None:
        # Other requests of the batch may have asked although this one did not.
        if self.logprobs is None or self.num_logprobs is None or self.cumulative_logprob is None:
            return
        for position in self._positions(new, self.num_logprobs, self._context):
            self.logprobs.append(position)
            self.cumulative_logprob += next(iter(position.values())).logprob

    def _update_prompt_logprobs(self, new: LogprobsTensors) -> None:
        if self.prompt_logprobs is None or self.num_prompt_logprobs is None:
            return
        positions = self._positions(new, self.num_prompt_logprobs, self._prompt_context)
        self.prompt_logprobs = [None, *positions]

    def _positions(
        self, new: LogprobsLists | LogprobsTensors, num_logprobs: int, context: list[int]
    ) -> list[dict[int, Logprob]]:
        """Return one dict per row: the token of column 0 first, with its given rank, then the best ones.

        Rows may be wider than `num_logprobs` + 1, when another request of the batch asked for more. `context`
        is brought up to date.
        """
        num_columns = None if num_logprobs == -1 else num_logprobs + 1
        rows = zip(_to_list(new[0]), _to_list(new[1]), _to_list(new[2]), strict=True)
        positions = []
        for token_ids, logprobs, rank in rows:
            ids = token_ids[:num_columns]
            texts = self._decode_alone(ids, context)
            position = {ids[0]: Logprob(logprobs[0], rank, texts[0])}
            for i in range(1, len(ids)):
                position.setdefault(ids[i], Logprob(logprobs[i], i, texts[i]))
            positions.append(position)
            context.append(ids[0])
            del context[:-MAX_UNFINISHED]
        return positions

    def _decode_alone(self, token_ids: list[int], context: list[int]) -> Sequence[str | None]:
        """Return the text of each of `token_ids`, alternatives at one position, by itself."""
        if self.tokenizer is None:
            return [None] * len(token_ids)
        texts = [self.tokenizer.decode([token_id]) for token_id in token_ids]
        for i, text in enumerate(texts):
            if text.endswith(REPLACEMENT):
                texts[i] = self._decode_in_context(token_ids[i], text, context)
        return texts

    def _decode_in_context(self, token_id: int, alone: str, context: list[int]) -> str:
        """Return the text of a token that ends within a character, or ends one that began in `context`.

        A character belongs to the token that completes it; unfinished bytes have no text.
        """
        for start in range(len(context) - 1, -1, -1):
            before = context[start:]
            text: str = self.tokenizer.decode([*before, token_id])
            if text.endswith(REPLACEMENT):
                continue
            shown = self.tokenizer.decode(before).rstrip(REPLACEMENT)
            if text.startswith(shown):
                return text[len(shown) :]
        return alone.rstrip(REPLACEMENT)


def _to_list(values: Any) -> list[Any]:
    """Return a tensor, a numpy array or nested sequences of them as plain lists and numbers."""
    if hasattr(values, "tolist"):
        plain: list[Any] = values.tolist()
        return plain
    return [_to_list(v) if isinstance(v, (list, tuple)) or hasattr(v, "tolist") else v for v in values]
