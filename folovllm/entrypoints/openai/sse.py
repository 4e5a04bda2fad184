"""Outputs on their way to a client: merged from several prompts, sent as events, dropped when the client leaves.

    generate() of each prompt -> OutputStream -> events (bytes) -> EventStreamResponse -> socket

Whoever holds an OutputStream closes it; closing aborts in the engine what still runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from folovllm.entrypoints.openai.errors import ClientDisconnected
from folovllm.outputs import RequestOutput

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
"""The event after the last one of a stream that ended well."""
_encode = msgspec.json.Encoder().encode


def event(data: Any) -> bytes:
    """Return `data` as one server-sent event."""
    return b"data: " + _encode(data) + b"\n\n"


class OutputStream:
    """The outputs of one HTTP request: of one prompt, or of several as they come.

    `start` returns when every prompt has its first output, hence none was refused; iterating yields (prompt index,
    output), those first ones included. While nobody iterates, the engine merges outputs: at most one per prompt waits.
    """

    def __init__(self, generators: Sequence[AsyncGenerator[RequestOutput, None]]) -> None:
        self._generators = list(generators)
        self.first: list[RequestOutput] = []
        """The first output of every prompt; for FINAL_ONLY requests that is all there is."""
        self._pumps: list[asyncio.Task[None]] = []

    async def start(self) -> list[RequestOutput]:
        """Wait for the first output of every prompt and return them.

        Raises:
            ValueError: a prompt was refused; none of the others goes on.
            EngineDeadError: the engine is dead.
        """
        if len(self._generators) == 1:
            self.first = [await anext(self._generators[0])]
            return self.first
        tasks = [asyncio.ensure_future(_next(generator)) for generator in self._generators]
        try:
            self.first = list(await asyncio.gather(*tasks))
        finally:
            await cancel_and_wait(tasks)
        return self.first

    async def __aiter__(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        for index, output in enumerate(self.first):
            yield index, output
        if len(self._generators) == 1:
            async for output in self._generators[0]:
                yield 0, output
            return
        queue: asyncio.Queue[tuple[int, RequestOutput] | Exception | None] = asyncio.Queue(1)
        self._pumps = [
            asyncio.ensure_future(self._pump(index, generator, queue))
            for index, generator in enumerate(self._generators)
        ]
        num_running = len(self._pumps)
        while num_running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_running -= 1
            else:
                yield item

    @staticmethod
    async def _pump(
        index: int,
        generator: AsyncGenerator[RequestOutput, None],
        queue: asyncio.Queue[tuple[int, RequestOutput] | Exception | None],
    ) -> None:
        try:
            async for output in generator:
                await queue.put((index, output))
        except Exception as error:  # whatever it is, the reader is to raise it
            await queue.put(error)
        else:
            await queue.put(None)

    async def aclose(self) -> None:
        """End what still runs, in the engine too; may be called again."""
        await cancel_and_wait(self._pumps)
        for generator in self._generators:
            await generator.aclose()


async def _next(generator: AsyncGenerator[T, None]) -> T:
    return await anext(generator)  # a coroutine, which a task needs; anext() gives an awaitable


async def cancel_and_wait(tasks: Sequence[asyncio.Future[Any]]) -> None:
    """Cancel tasks and wait until they have ended; what they raise is dropped."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client is gone; the request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def run_until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns, unless the client leaves before: then cancel it at once.

    Raises:
        ClientDisconnected: the client left.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(wait_for_disconnect(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnected
        return task.result()
    finally:
        await cancel_and_wait((task, watcher))


class EventStreamResponse(Response):
    """Sends events as they come; stops at once when the client leaves. Either way `on_close` is awaited at the end."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], on_close: Callable[[], Awaitable[None]]) -> None:
        """`events`: each is sent as it is; they must not raise."""
        # X-Accel-Buffering: nginx would otherwise collect events before it passes them on.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(None, 200, headers)
        del self.headers["content-length"]
        self.events = events
        self.on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response; see ASGI."""
        sender = asyncio.ensure_future(self._send_events(send))
        watcher = asyncio.ensure_future(wait_for_disconnect(receive))
        try:
            await asyncio.wait((sender, watcher), return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                sender.result()  # raises what it raised
        finally:
            await cancel_and_wait((sender, watcher))
            await self.events.aclose()
            await self.on_close()

    async def _send_events(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for data in self.events:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
