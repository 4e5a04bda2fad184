"""What happens to a request before any route sees it: its id, its key, the size of its body; and if a route fails.

Plain ASGI, not Starlette's BaseHTTPMiddleware, which would copy every chunk of a stream through a queue
(vLLM: `entrypoints/openai/server_utils.py`).
"""

from __future__ import annotations

import hashlib
import hmac
import re
import uuid
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from folovllm.entrypoints.openai.errors import APIError
from folovllm.utils.common import init_logger

logger = init_logger(__name__)

OPEN_PATHS = frozenset({"/health"})
"""Answered without an API key: load balancers ask them."""
REQUEST_ID_HEADER = "X-Request-Id"
_REQUEST_ID = re.compile(rb"[!-~]{1,128}")


class RequestIdMiddleware:
    """Gives every response the X-Request-Id of its request, or a new one; 500s as well, which are made here.

    An id that could break a log line (1 to 128 visible ASCII characters are fine) is refused with 400.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection; see ASGI."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = _header(scope, b"x-request-id")
        valid = given is not None and _REQUEST_ID.fullmatch(given) is not None
        request_id = given if given is not None and valid else uuid.uuid4().hex.encode()
        scope.setdefault("state", {})["request_id"] = request_id.decode()

        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
            await send(message)

        if given is not None and not valid:
            error = APIError(
                400,
                f"{REQUEST_ID_HEADER} must be 1 to 128 visible ASCII characters, without spaces.",
                param=REQUEST_ID_HEADER,
                code="invalid_value",
            )
            return await error.response()(scope, receive, send_with_id)
        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            logger.exception("Request %s failed", request_id.decode())
            if started:
                raise  # the connection is closed: its client must not take what it has for the whole
            await APIError(500, "Internal server error.").response()(scope, receive, send_with_id)


class AuthenticationMiddleware:
    """Lets a request through if it shows one of the API keys: `Authorization: Bearer KEY`."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str]) -> None:
        self.app = app
        # Digests have one length: comparing them says nothing about the keys' lengths either.
        self._digests = [hashlib.sha256(key.encode()).digest() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection; see ASGI."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            return await self.app(scope, receive, send)
        scheme, _, key = (_header(scope, b"authorization") or b"").partition(b" ")
        if scheme.lower() != b"bearer" or not self._is_known(key.strip()):
            error = APIError(
                401,
                "A valid API key is needed: send it as `Authorization: Bearer KEY`.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            return await error.response()(scope, receive, send)
        scope.setdefault("state", {})["api_key"] = key.strip()
        return await self.app(scope, receive, send)

    def _is_known(self, key: bytes) -> bool:
        """Compare with all keys, in a time that depends on none of them."""
        given = hashlib.sha256(key).digest()
        # A list, not any(): every key is compared, whichever matches.
        return True in [hmac.compare_digest(given, digest) for digest in self._digests]


class BodyLimitMiddleware:
    """Refuses bodies above a size with 413: by Content-Length at once, else as soon as that much has come."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection; see ASGI."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        length = _header(scope, b"content-length")
        if length is not None and (not length.isdigit() or int(length[:20]) > self.max_bytes):
            return await self._error().response()(scope, receive, send)
        num_read = 0

        async def limited_receive() -> Message:
            nonlocal num_read
            message = await receive()
            if message["type"] == "http.request":
                num_read += len(message.get("body", b""))
                if num_read > self.max_bytes:
                    raise self._error()
            return message

        await self.app(scope, limited_receive, send)

    def _error(self) -> APIError:
        # The rest of the body is still on its way: the connection cannot be used again.
        return APIError(
            413,
            f"The body is larger than {self.max_bytes} bytes, the most this server takes.",
            code="body_too_large",
            headers={"Connection": "close"},
        )


def _header(scope: Scope, name: bytes) -> bytes | None:
    """Return the last header called `name` (lower case), None without one."""
    value: bytes | None = None
    for key, content in scope["headers"]:
        if key == name:
            value = content
    return value
