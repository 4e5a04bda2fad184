"""The routes of the server, and the application that they make up (vLLM: `entrypoints/openai/api_server.py`).

socket -> uvicorn -> request id -> CORS -> API key -> body limit -> route -> serving_*.py -> EngineClient
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from folovllm.engine.protocol import EngineClient
from folovllm.entrypoints.openai.errors import install_handlers
from folovllm.entrypoints.openai.middleware import (
    OPEN_PATHS,
    REQUEST_ID_HEADER,
    AuthenticationMiddleware,
    BodyLimitMiddleware,
    RequestIdMiddleware,
)
from folovllm.entrypoints.openai.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    ErrorResponse,
    TokenizeRequest,
)
from folovllm.entrypoints.openai.serving import OpenAIServing, json_response
from folovllm.entrypoints.openai.serving_chat import OpenAIServingChat
from folovllm.entrypoints.openai.serving_completion import OpenAIServingCompletion
from folovllm.entrypoints.openai.serving_tokenize import OpenAIServingTokenization
from folovllm.entrypoints.openai.settings import ServerSettings
from folovllm.metrics.prometheus import PrometheusStatLogger
from folovllm.version import __version__

_ERRORS = {
    400: "The request is wrong; `param` names the field.",
    401: "No valid API key.",
    404: "No such model.",
    413: "The body is too large.",
    429: "The queue is full; `Retry-After` says when to come again.",
    500: "A mistake of the server's.",
    503: "The engine is not running.",
}


def _responses(*statuses: int, success: str = "Success.", streams: bool = False) -> dict[int | str, dict[str, Any]]:
    """Return what OpenAPI is to say about a route's responses."""
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse, "description": _ERRORS[status]} for status in statuses
    }
    return {200: {"description": success, "content": content}, **errors}


_ANY = (400, 401, 413, 500)
_GENERATE = (400, 401, 404, 413, 429, 500, 503)
router = APIRouter()


def _serving(raw: Request) -> OpenAIServing:
    serving: OpenAIServing = raw.app.state.serving
    return serving


@router.get("/health", responses=_responses(400, 500, 503), response_model=None)
async def health(raw: Request) -> Response:
    """Say whether the engine can serve; needs no API key."""
    await _serving(raw).engine.check_health()
    return json_response({"status": "ok"})


@router.get("/version", responses=_responses(400, 401, 500), response_model=None)
async def version() -> Response:
    """Return the version of this server."""
    return json_response({"version": __version__})


@router.get("/v1/models", responses=_responses(400, 401, 500), response_model=None)
async def list_models(raw: Request) -> Response:
    """List the served model under each of its names."""
    serving = _serving(raw)
    return json_response({"object": "list", "data": [_model_card(serving, name) for name in serving.model_names]})


@router.get("/v1/models/{model:path}", responses=_responses(400, 401, 404, 500), response_model=None)
async def retrieve_model(model: str, raw: Request) -> Response:
    """Describe one model."""
    serving = _serving(raw)
    serving.check_model(model)
    return json_response(_model_card(serving, model))


def _model_card(serving: OpenAIServing, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": serving.created,
        "owned_by": "folovllm",
        "root": serving.engine.vllm_config.model_config.model,
        "parent": None,
        "max_model_len": serving.max_model_len,
    }


@router.post("/v1/completions", responses=_responses(*_GENERATE, streams=True), response_model=None)
async def create_completion(request: CompletionRequest, raw: Request) -> Response:
    """Continue text or tokens."""
    return await OpenAIServingCompletion(_serving(raw)).create_completion(request, raw)


@router.post("/v1/chat/completions", responses=_responses(*_GENERATE, streams=True), response_model=None)
async def create_chat_completion(request: ChatCompletionRequest, raw: Request) -> Response:
    """Answer a conversation."""
    return await OpenAIServingChat(_serving(raw)).create_chat_completion(request, raw)


@router.post("/tokenize", responses=_responses(*_ANY, 404), response_model=None)
async def tokenize(request: TokenizeRequest, raw: Request) -> Response:
    """Return the tokens of a text, or of a conversation (`messages`)."""
    return json_response(await OpenAIServingTokenization(_serving(raw)).create_tokenize(request.root))


@router.post("/detokenize", responses=_responses(*_ANY, 404), response_model=None)
async def detokenize(request: DetokenizeRequest, raw: Request) -> Response:
    """Return the text of tokens."""
    return json_response(await OpenAIServingTokenization(_serving(raw)).create_detokenize(request))


dev_router = APIRouter()


@dev_router.post("/reset_prefix_cache", responses=_responses(400, 401, 500, 503), response_model=None)
async def reset_prefix_cache(raw: Request) -> Response:
    """Forget all cached prefixes; `success` is false, and nothing forgotten, while requests hold some."""
    return json_response({"success": await _serving(raw).engine.reset_prefix_cache()})


def build_app(engine: EngineClient, settings: ServerSettings, metrics: PrometheusStatLogger | None) -> FastAPI:
    """Return the application, which answers through `engine`. It does not shut the engine down.

    Args:
        engine: running.
        settings: how to serve.
        metrics: what GET /metrics shows; None leaves the route out.
    """
    serving = OpenAIServing(engine, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        serving.renderer.close()

    app = FastAPI(
        title="FoloVLLM",
        version=__version__,
        summary="An OpenAI-compatible server for one language model.",
        middleware=_middleware(settings),
        lifespan=lifespan,
        # These pages load scripts from elsewhere. /openapi.json stays.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would go where the request's Host header says
    )
    app.state.serving = serving
    install_handlers(app)
    app.include_router(router)
    if settings.dev_mode:
        app.include_router(dev_router)
    if metrics is not None:
        _add_metrics(app, metrics)
    _describe(app, settings)
    return app


def _middleware(settings: ServerSettings) -> list[Middleware]:
    """Return the middleware, outermost first."""
    layers = [Middleware(RequestIdMiddleware)]
    if settings.allowed_origins:
        # Before the API key: a browser's preflight request carries none.
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.allowed_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=[REQUEST_ID_HEADER],
            )
        )
    if settings.api_key:
        layers.append(Middleware(AuthenticationMiddleware, api_keys=settings.api_key))
    layers.append(Middleware(BodyLimitMiddleware, max_bytes=settings.max_body_bytes))
    return layers


def _add_metrics(app: FastAPI, metrics: PrometheusStatLogger) -> None:
    description: dict[int | str, dict[str, Any]] = {
        200: {"description": "Prometheus text format.", "content": {"text/plain": {}}}
    }
    errors = {key: value for key, value in _responses(400, 401, 500).items() if key != 200}

    @app.get("/metrics", responses={**description, **errors}, response_model=None)
    async def show_metrics() -> Response:
        """Return the counters for Prometheus."""
        body, content_type = metrics.render()
        # Not media_type: Starlette would add a second charset.
        return Response(body, headers={"Content-Type": content_type})


def _describe(app: FastAPI, settings: ServerSettings) -> None:
    """Let /openapi.json tell how it is: no 422 anywhere, and keys where they are asked for."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
            for path, operations in document["paths"].items():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
                    if settings.api_key and path not in OPEN_PATHS:
                        operation["security"] = [{"bearer": []}]
            schemas = document["components"]["schemas"]
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            if settings.api_key:
                document["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
