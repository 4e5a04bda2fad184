"""The client of `folovllm bench serve`: sends one request, and writes down when each piece of the answer came.

(vLLM: `benchmarks/lib/endpoint_request_func.py`.) Nothing is averaged here: serve_report.py makes figures of the
records. What a token costs the client is a few microseconds, so that what is measured is the server.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    import aiohttp

CHAT_ENDPOINT = "/v1/chat/completions"
"""Takes messages."""
COMPLETIONS_ENDPOINT = "/v1/completions"
"""Takes text or token ids."""
READ_BYTES = 1 << 16
"""Buffer of a connection."""
MAX_MESSAGE_CHARS = 200
"""An error's text is cut there: it is counted by its text."""


@dataclass(frozen=True)
class ServeRequest:
    """What is asked."""

    prompt: str | list[int]
    """Text, or token ids (completions only)."""
    max_tokens: int
    """Most output tokens."""


class ServeRecord(msgspec.Struct):
    """What one request saw. Times are seconds of the client's monotonic clock."""

    sent: float
    """Handed to the connection."""
    max_tokens: int
    """As asked."""
    late_s: float = 0.0
    """Sent so much later than the schedule of arrivals says."""
    event_times: list[float] = []
    """When each event with text came."""
    ended: float = 0.0
    """When the answer, or the failure, was complete."""
    num_prompt_tokens: int | None = None
    """As the server counts; None where it does not say."""
    num_cached_tokens: int = 0
    """Prompt tokens that the server had cached."""
    num_output_tokens: int | None = None
    """As the server counts; None where it does not say."""
    finish_reason: str | None = None
    """The server's word."""
    error: str | None = None
    """What went wrong; such a request counts in no latency."""

    @property
    def num_tokens(self) -> int:
        """Output tokens; events where the server does not count them."""
        return len(self.event_times) if self.num_output_tokens is None else self.num_output_tokens

    @property
    def ttft_s(self) -> float | None:
        """Seconds to the first event with text; None where none came."""
        return self.event_times[0] - self.sent if self.event_times else None

    @property
    def tpot_s(self) -> float | None:
        """Seconds per output token after the first; None where there is no second."""
        if self.num_tokens < 2 or len(self.event_times) < 2:
            return None
        return (self.event_times[-1] - self.event_times[0]) / (self.num_tokens - 1)

    @property
    def e2e_s(self) -> float:
        """Seconds to the end."""
        return self.ended - self.sent

    @property
    def itls_s(self) -> list[float]:
        """Seconds between events."""
        return [later - sooner for sooner, later in zip(self.event_times, self.event_times[1:], strict=False)]


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: Any = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Cached(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Cached | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode_event = msgspec.json.Decoder(_Event).decode


class ServerError(Exception):
    """The server answered with an error, or not as OpenAI's does."""


class ServeClient:
    """Sends requests to one server. Use it in `async with`."""

    def __init__(
        self,
        base_url: str,
        endpoint: str,
        model: str,
        api_key: str | None = None,
        extra_body: dict[str, Any] | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        """Connect to nothing yet.

        Args:
            base_url: as in http://127.0.0.1:8000.
            endpoint: COMPLETIONS_ENDPOINT, or CHAT_ENDPOINT, or one that ends like it.
            model: the request's `model`; "": ask the server, with resolve_model().
            api_key: sent as a bearer token; None: none.
            extra_body: further fields of every request.
            timeout_s: a request that takes longer has failed.
        """
        self.base_url = base_url.rstrip("/")
        self.endpoint = endpoint
        self.model = model
        self.is_chat = endpoint.endswith("chat/completions")
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._extra_body = extra_body or {}
        self._timeout_s = timeout_s
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> ServeClient:
        import aiohttp

        self._session = aiohttp.ClientSession(
            headers=self._headers,
            # As many connections as there are requests: the queue to be measured is the server's.
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=self._timeout_s),
            read_bufsize=READ_BYTES,
            trust_env=False,
        )
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def resolve_model(self) -> str:
        """Return the model; where none was given, the first that the server lists.

        Raises:
            ValueError: the server cannot be reached, or lists none.
        """
        import aiohttp

        assert self._session is not None
        url = f"{self.base_url}/v1/models"
        try:
            async with self._session.get(url) as response:
                if response.status != 200:
                    raise ValueError(f"{url} answered with status {response.status}: {await _message(response)}")
                models = (await response.json())["data"]
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
            raise ValueError(f"--base-url {self.base_url}: no server answers there ({_name(error)}).") from error
        except (KeyError, TypeError, UnicodeError) as error:
            raise ValueError(f"{url} does not list models as OpenAI's servers do; give --model.") from error
        if not self.model:
            if not models:
                raise ValueError(f"{url} lists no model; give --model.")
            self.model = str(models[0]["id"])
        return self.model

    async def send(self, request: ServeRequest, late_s: float = 0.0) -> ServeRecord:
        """Send a request and read its answer to the end. Failures are in the record; only cancelling raises."""
        import aiohttp

        record = ServeRecord(sent=time.perf_counter(), max_tokens=request.max_tokens, late_s=late_s)
        try:
            await self._send(request, record)
        except ServerError as error:
            record.error = str(error)
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
            record.error = _name(error)
        except msgspec.MsgspecError as error:
            record.error = f"an event is not OpenAI's: {error}"[:MAX_MESSAGE_CHARS]
        record.ended = time.perf_counter()
        return record

    def _body(self, request: ServeRequest) -> bytes:
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": request.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.is_chat:
            body["messages"] = [{"role": "user", "content": request.prompt}]
        else:
            body["prompt"] = request.prompt
        return msgspec.json.encode(body | self._extra_body)

    async def _send(self, request: ServeRequest, record: ServeRecord) -> None:
        assert self._session is not None
        headers = {"Content-Type": "application/json"}
        url = self.base_url + self.endpoint
        async with self._session.post(url, data=self._body(request), headers=headers) as response:
            if response.status != 200:
                raise ServerError(f"status {response.status}: {await _message(response)}")
            rest, complete = b"", False
            async for data in response.content.iter_any():
                now = time.perf_counter()
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    if line.startswith(b"data:") and not complete:
                        complete = self._take_event(line[5:].strip(), now, record)
        if not complete:
            raise ServerError("the answer broke off: no [DONE]")

    def _take_event(self, data: bytes, now: float, record: ServeRecord) -> bool:
        """Write down an event; whether it was the last one."""
        if data == b"[DONE]":
            return True
        event = _decode_event(data)
        if event.error is not None:
            raise ServerError(f"error in the stream: {_text_of(event.error)}")
        for choice in event.choices:
            delta = choice.delta
            if choice.text or (delta and (delta.content or delta.reasoning_content or delta.tool_calls)):
                record.event_times.append(now)
            record.finish_reason = choice.finish_reason or record.finish_reason
        if event.usage is not None:
            record.num_prompt_tokens = event.usage.prompt_tokens
            record.num_output_tokens = event.usage.completion_tokens
            details = event.usage.prompt_tokens_details
            record.num_cached_tokens = (details.cached_tokens if details else None) or 0
        return False


async def _message(response: aiohttp.ClientResponse) -> str:
    """What an error's body says."""
    text = await response.text(errors="replace")
    try:
        return _text_of(msgspec.json.decode(text)["error"])
    except (msgspec.MsgspecError, KeyError, TypeError):
        return text[:MAX_MESSAGE_CHARS]


def _text_of(error: Any) -> str:
    """The message of an OpenAI error object, or whatever stands there."""
    message = error.get("message", error) if isinstance(error, dict) else error
    return str(message)[:MAX_MESSAGE_CHARS]


def _name(error: BaseException) -> str:
    """A failure of the connection in words that are the same each time: it is counted by them."""
    return f"{type(error).__name__}: {error}"[:MAX_MESSAGE_CHARS] if str(error) else type(error).__name__
