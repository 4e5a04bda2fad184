"""For tests of the HTTP server: a scripted engine behind the real application on a real socket.

FakeEngine checks requests with the engine's own Processor, so that errors are the true ones; its answers are a script.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from typing import Any

import httpx
import uvicorn

from folovllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
from folovllm.engine.processor import Processor, PromptType
from folovllm.engine.protocol import EngineClient, EngineDeadError
from folovllm.entrypoints.openai.api_server import build_app
from folovllm.entrypoints.openai.settings import ServerSettings
from folovllm.metrics.prometheus import PrometheusStatLogger
from folovllm.outputs import CompletionOutput, Logprob, RequestOutput
from folovllm.sampling_params import RequestOutputKind, SamplingParams
from tests.fakes import FakeTokenizer

WORDS = ("Hel", "lo", " wor", "ld")
MODEL = "fake"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>\n{% endfor %}{{ enable_thinking or '' }}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
)
TIMEOUT_S = 20.0


class RenderingTokenizer(FakeTokenizer):
    """FakeTokenizer with a chat template of Jinja, rendered as transformers does."""

    def __init__(self) -> None:
        super().__init__(chat_template=CHAT_TEMPLATE)
        self.kwargs_seen: list[dict[str, Any]] = []

    def __deepcopy__(self, memo: Any) -> RenderingTokenizer:
        return self  # so that tests see what was rendered

    def apply_chat_template(self, conversation: Any, chat_template: Any = None, **kwargs: Any) -> Any:
        """Remember the keywords; add "|A" for a generation prompt and "|C" for a continued message."""
        from transformers.utils.chat_template_utils import render_jinja_template

        self.kwargs_seen.append({"messages": conversation, **kwargs})
        flags = {name: kwargs.pop(name) for name in ("add_generation_prompt", "continue_final_message", "tokenize")}
        (text,), _ = render_jinja_template([conversation], chat_template=chat_template, **kwargs)
        return text + "|A" * flags["add_generation_prompt"] + "|C" * flags["continue_final_message"]


class FakeEngine(EngineClient):
    """Answers every prompt with `words`, a word a token; for sample i > 0 in capitals."""

    def __init__(self, words: Sequence[str] = WORDS, max_num_seqs: int = 4, policy: str = "fcfs") -> None:
        self.reset(words)
        self.seen: list[tuple[Any, SamplingParams, str, int]] = []
        self.num_running = 0
        self.num_shutdowns = 0
        self._tokenizer = RenderingTokenizer()
        hf_config = {"vocab_size": len(self._tokenizer), "max_position_embeddings": 512}
        self.vllm_config = VllmConfig(
            model_config=ModelConfig(MODEL, hf_config=hf_config),
            cache_config=CacheConfig(),
            scheduler_config=SchedulerConfig(max_model_len=512, max_num_seqs=max_num_seqs, policy=policy),
        )
        self.processor = Processor(self.vllm_config, self._tokenizer, {})

    def reset(self, words: Sequence[str] = WORDS) -> None:
        """Go back to the script of the beginning."""
        self.words = list(words)
        self.delay_s = 0.0
        """Before each token."""
        self.gate: Callable[[int], None] = lambda index: None
        """Called before token `index`; may raise."""
        self.finish: tuple[str, int | str | None] = ("stop", None)
        self.num_cached_tokens = 3
        self.defaults = SamplingParams()
        self.aborted: list[str] = []
        self.num_yielded = 0
        self.is_dead = False

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    @property
    def errored(self) -> bool:
        return self.is_dead

    @property
    def is_running(self) -> bool:
        return not self.is_dead

    @property
    def dead_error(self) -> EngineDeadError:
        return EngineDeadError("secret traceback")

    async def generate(
        self, prompt: PromptType, sampling_params: SamplingParams, request_id: str, *, priority: int = 0
    ) -> AsyncGenerator[RequestOutput, None]:
        if self.is_dead:
            raise self.dead_error
        text, request = self.processor.process_inputs(request_id, prompt, sampling_params, priority=priority)
        params = request.sampling_params
        self.seen.append((prompt, params, request_id, priority))
        self.num_running += 1
        finished = False
        prompt_ids = request.prompt_token_ids or []
        words = self.words[: params.max_tokens]
        finish = self.finish if len(words) == len(self.words) else ("length", None)
        everything: list[CompletionOutput] = []
        try:
            for i, word in enumerate(words):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                self.gate(i)
                if self.is_dead:
                    raise self.dead_error
                last = i == len(words) - 1
                samples = [self._sample(k, word, params, finish if last else (None, None)) for k in range(params.n)]
                everything = samples if i == 0 else [_join(a, b) for a, b in zip(everything, samples, strict=True)]
                delta = params.output_kind == RequestOutputKind.DELTA
                if delta or last:
                    self.num_yielded += 1
                    finished = last
                    yield RequestOutput(
                        request_id,
                        text,
                        prompt_ids,
                        self._prompt_logprobs(prompt_ids, params) if i == 0 or not delta else [],
                        samples if delta else everything,
                        last,
                        num_cached_tokens=self.num_cached_tokens,
                    )
        finally:
            self.num_running -= 1
            if not finished:
                self.aborted.append(request_id)

    def _sample(
        self, index: int, word: str, params: SamplingParams, finish: tuple[str | None, int | str | None]
    ) -> CompletionOutput:
        logprobs = None
        if params.logprobs is not None:
            best = {7: Logprob(-0.5, 1, "x"), 8: Logprob(float("-inf"), 3, "y")}
            logprobs = [{len(word): Logprob(-1.5, 2, word), **dict(list(best.items())[: params.logprobs])}]
        text = word if index == 0 else word.upper()
        return CompletionOutput(index, text, [len(word)], None, logprobs, finish[0], finish[1])

    @staticmethod
    def _prompt_logprobs(ids: Sequence[int], params: SamplingParams) -> Any:
        if params.prompt_logprobs is None:
            return None
        return [None, *({i: Logprob(-0.25, 1, chr(i - FakeTokenizer.first_byte))} for i in ids[1:])]

    async def abort(self, request_id: str | Iterable[str]) -> None:
        raise NotImplementedError

    async def check_health(self) -> None:
        if self.is_dead:
            raise self.dead_error

    async def reset_prefix_cache(self) -> bool:
        return self.num_running == 0

    def get_default_sampling_params(self) -> SamplingParams:
        return self.defaults.clone()

    def num_unfinished_requests(self) -> int:
        return self.num_running

    async def wait_dead(self) -> None:
        while not self.is_dead:
            await asyncio.sleep(0.01)

    async def shutdown(self, timeout_s: float = 0.0) -> None:
        self.num_shutdowns += 1

    @property
    def last_params(self) -> SamplingParams:
        """Of the last request."""
        return self.seen[-1][1]


def _join(a: CompletionOutput, b: CompletionOutput) -> CompletionOutput:
    logprobs = None if a.logprobs is None else a.logprobs + (b.logprobs or [])
    ids = [*a.token_ids, *b.token_ids]
    return CompletionOutput(a.index, a.text + b.text, ids, None, logprobs, b.finish_reason, b.stop_reason)


class Served:
    """A running server and a client of it."""

    def __init__(self, engine: Any, port: int) -> None:
        self.engine = engine
        self.url = f"http://127.0.0.1:{port}"
        self.port = port
        self.client = httpx.Client(base_url=self.url, timeout=TIMEOUT_S)

    def post(self, path: str, body: Any, **kwargs: Any) -> httpx.Response:
        """Send JSON."""
        return self.client.post(path, json=body, **kwargs)

    def complete(self, **fields: Any) -> httpx.Response:
        """POST /v1/completions with a prompt."""
        return self.post("/v1/completions", {"prompt": "abc", **fields})

    def chat(self, **fields: Any) -> httpx.Response:
        """POST /v1/chat/completions with a message."""
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], **fields})


@contextlib.contextmanager
def serve(engine: Any = None, metrics: PrometheusStatLogger | None = None, **settings: Any) -> Iterator[Served]:
    """Serve `engine` (a new FakeEngine by default) on a free port, in a thread, until the block ends."""
    engine = FakeEngine() if engine is None else engine
    app = build_app(engine, ServerSettings(**settings), metrics)
    config = uvicorn.Config(app, port=0, log_level="critical", ws="none", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    try:
        wait_until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        served = Served(engine, port)
        try:
            yield served
        finally:
            served.client.close()
    finally:
        server.should_exit = True
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()


def wait_until(condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
    """Wait until `condition()`; fail after a while."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


def events(text: str) -> list[Any]:
    """Return the data of server-sent events; [DONE] as the string it is."""
    assert text.endswith("\n\n"), text
    found = []
    for block in text[:-2].split("\n\n"):
        assert block.startswith("data: ") and "\n" not in block, block
        data = block.removeprefix("data: ")
        found.append(data if data == "[DONE]" else json.loads(data))
    return found
