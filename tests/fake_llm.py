"""A fake LLM for tests of the command line: its answers are scripted and its steps counted."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from folovllm.entrypoints.cli import chat, generate, streaming
from folovllm.outputs import CompletionOutput, Logprob, RequestOutput
from folovllm.sampling_params import SamplingParams

WORDS = ["He", "llo", " wor", "ld"]


class FakeEngine:
    """Answers a prompt with WORDS (or `script[request id]`), a word a step; a letter a token."""

    def __init__(self, max_model_len: int = 200) -> None:
        self.vllm_config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=max_model_len))
        self.startup_report = "fake model, no backend"
        self.script: dict[str, list[str]] = {}
        self.requests: dict[str, tuple[list[int], SamplingParams, list[str]]] = {}
        self.prompts: list[Any] = []
        self.aborted: list[str] = []
        self.num_steps = 0
        self.on_step: Callable[[int], None] = lambda step: None
        self.finish_reason = "stop"
        self.stop_reason: str | None = None

    def add_request(self, request_id: str, prompt: Any, params: SamplingParams) -> None:
        token_ids = [ord(c) for c in prompt] if isinstance(prompt, str) else prompt["prompt_token_ids"]
        limit = self.vllm_config.model_config.max_model_len
        if len(token_ids) > limit - 1:
            raise ValueError(f"prompt has {len(token_ids)} tokens; at most {limit - 1} fit.")
        assert request_id not in self.requests
        self.prompts.append(prompt)
        self.requests[request_id] = (token_ids, params, list(self.script.get(request_id, WORDS)))

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def abort_request(self, request_ids: list[str]) -> None:
        self.aborted += request_ids
        for request_id in request_ids:
            self.requests.pop(request_id, None)

    def step(self) -> list[RequestOutput]:
        self.num_steps += 1
        self.on_step(self.num_steps)
        outputs = []
        for request_id, (token_ids, params, words) in list(self.requests.items()):
            words_left = words[1:]
            num_done = len(self.script.get(request_id, WORDS)) - len(words_left)
            finish = None
            if not words_left:
                finish = self.finish_reason
            elif params.max_tokens is not None and num_done >= params.max_tokens:
                finish = "length"
            # The samples of a request come apart, the last one first.
            for index in reversed(range(params.n)):
                completion = self._completion(index, words[0], params, finish)
                done = finish is not None and index == 0
                # Once, with whichever sample comes first, and empty afterwards.
                first = num_done == 1 and index == params.n - 1
                prompt_logprobs = self._prompt_logprobs(token_ids, params) if first else []
                outputs.append(
                    RequestOutput(request_id, None, token_ids, prompt_logprobs, [completion], done, num_cached_tokens=3)
                )
            self.requests[request_id] = (token_ids, params, words_left)
            if finish is not None:
                del self.requests[request_id]
        return outputs

    def _completion(self, index: int, word: str, params: SamplingParams, finish: str | None) -> CompletionOutput:
        token_id = len(word)
        logprobs = None
        if params.logprobs is not None:
            logprobs = [
                {
                    token_id: Logprob(-1.5, 2, word),
                    99: Logprob(-math.inf, 3, "never"),
                    7: Logprob(-0.5, 1, "x"),
                }
            ]
        return CompletionOutput(
            index=index,
            text=word if index == 0 else word.upper(),
            token_ids=[token_id],
            logprobs=logprobs,
            cumulative_logprob=None if logprobs is None else -1.5 * self.num_steps,
            finish_reason=finish,
            stop_reason=self.stop_reason if finish else None,
        )

    def _prompt_logprobs(self, token_ids: list[int], params: SamplingParams) -> Any:
        if params.prompt_logprobs is None:
            return []
        return [None, *({t: Logprob(-0.25, 1, chr(t))} for t in token_ids[1:])]


class FakeLLM:
    """What the command uses of LLM: a template that writes `<role>content` and ends with `<assistant>`."""

    def __init__(self, chat_template: str | None = "template", max_model_len: int = 200, **defaults: Any) -> None:
        self.llm_engine = FakeEngine(max_model_len)
        self.chat_template = chat_template
        self.defaults = SamplingParams(**{"temperature": 0.7, "top_p": 0.9, **defaults})
        self.conversations: list[tuple[list[dict[str, str]], str | None]] = []

    def get_tokenizer(self) -> Any:
        return SimpleNamespace(chat_template=self.chat_template)

    def get_default_sampling_params(self) -> SamplingParams:
        return self.defaults.clone()

    def preprocess_chat(self, messages: Any, chat_template: Any = None, add_generation_prompt: bool = True) -> Any:
        self.conversations.append(([dict(m) for m in messages], chat_template))
        text = "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>" * add_generation_prompt
        return {"prompt_token_ids": [ord(c) for c in text], "prompt": text}

    @property
    def seen_texts(self) -> list[str]:
        """The prompts that reached the engine."""
        return [p if isinstance(p, str) else p["prompt"] for p in self.llm_engine.prompts]


class Stdin(io.TextIOWrapper):
    """A stdin with these bytes."""

    def __init__(self, content: str | bytes, terminal: bool = False) -> None:
        super().__init__(io.BytesIO(content if isinstance(content, bytes) else content.encode()), encoding="utf-8")
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


class Terminal(io.StringIO):
    """A stdout that is a terminal, and remembers each write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes.append(text)
        return super().write(text)

    def isatty(self) -> bool:
        return True


def use(monkeypatch: pytest.MonkeyPatch, fake: FakeLLM) -> None:
    """Let the commands load `fake`, and errors be lines."""
    monkeypatch.delenv("FOLOVLLM_DEBUG", raising=False)
    monkeypatch.setattr(generate, "load_llm", lambda args: fake)
    monkeypatch.setattr(chat, "load_llm", lambda args: fake)


def fake_clock(monkeypatch: pytest.MonkeyPatch, engine: FakeEngine) -> None:
    """Make time stand still but for 2 s in the first step and 0.5 s in each later one."""
    clock = SimpleNamespace(
        perf_counter=lambda: 100.0 + 2.0 * bool(engine.num_steps) + 0.5 * max(engine.num_steps - 1, 0)
    )
    for module in (streaming, generate, chat):
        monkeypatch.setattr(module, "time", clock)
