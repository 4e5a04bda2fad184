"""SamplingParams of a request: the model's defaults, what the request says, the server's bounds in between.

vLLM has this as `to_sampling_params` of each request class.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from folovllm.entrypoints.openai.errors import BadRequestError
from folovllm.entrypoints.openai.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    ResponseFormatJsonObject,
    ResponseFormatJsonSchema,
)
from folovllm.entrypoints.openai.settings import ServerSettings
from folovllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

SAME_NAME = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "prompt_logprobs",
)
"""Fields that a request and SamplingParams both have; null leaves the default."""


def completion_params(request: CompletionRequest, defaults: SamplingParams, settings: ServerSettings) -> SamplingParams:
    """Return the parameters of a completion request.

    Raises:
        ValueError: a value cannot be; the message begins with its SamplingParams name.
        BadRequestError: a value is beyond the server's bounds.
    """
    max_tokens = request.max_tokens
    if max_tokens == 0:
        if not request.echo:
            raise BadRequestError("max_tokens=0 must be at least 1 (0 only with echo: the prompt alone).", "max_tokens")
        max_tokens = 1  # the engine always draws one; echo leaves it out
    if max_tokens is None:
        max_tokens = min(SamplingParams().max_tokens or 1, settings.max_output_tokens or 1 << 30)
    given: dict[str, Any] = {"logprobs": request.logprobs}
    if request.echo and request.prompt_logprobs is None:
        given["prompt_logprobs"] = request.logprobs
    structured = _structured_outputs(request, settings, None)
    return _build(request, defaults, settings, max_tokens, "max_tokens", given, structured)


def chat_params(
    request: ChatCompletionRequest,
    defaults: SamplingParams,
    settings: ServerSettings,
    forced_schema: dict[str, Any] | None,
) -> SamplingParams:
    """Return the parameters of a chat request; `forced_schema`: what tool_choice demands of the output. See above."""
    max_tokens, name = request.max_completion_tokens, "max_completion_tokens"
    if request.max_tokens is not None:
        if max_tokens is not None and max_tokens != request.max_tokens:
            raise BadRequestError(
                f"max_tokens={request.max_tokens} and max_completion_tokens={max_tokens} mean the same: give one.",
                "max_tokens",
            )
        max_tokens, name = request.max_tokens, "max_tokens"
    if max_tokens is None:
        # SamplingParams' own default is that of completions; another one is the model's.
        own = defaults.max_tokens if defaults.max_tokens != SamplingParams().max_tokens else None
        max_tokens = min(own or 1 << 30, settings.max_output_tokens or 1 << 30)
    if request.top_logprobs is not None and not request.logprobs:
        raise BadRequestError("top_logprobs needs logprobs=true.", "top_logprobs")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    structured = _structured_outputs(request, settings, forced_schema)
    unlimited = None if max_tokens == 1 << 30 else max_tokens
    return _build(request, defaults, settings, unlimited, name, {"logprobs": logprobs}, structured)


def _build(
    request: GenerationRequest,
    defaults: SamplingParams,
    settings: ServerSettings,
    max_tokens: int | None,
    max_tokens_name: str,
    given: dict[str, Any],
    structured: StructuredOutputsParams | None,
) -> SamplingParams:
    """Return `defaults` with what the request says in their place."""
    _check_bounds(request, settings)
    bound = settings.max_output_tokens
    if bound is not None and max_tokens is not None and max_tokens > bound:
        raise BadRequestError(
            f"{max_tokens_name}={max_tokens} must be at most {bound} on this server.", max_tokens_name
        )
    _check_stream_options(request)
    values = {name: getattr(request, name) for name in SAME_NAME}
    values = {name: value for name, value in values.items() if value is not None}
    values.update({name: value for name, value in given.items() if value is not None})
    return dataclasses.replace(
        defaults,
        **values,
        max_tokens=max_tokens,
        structured_outputs=structured,
        output_kind=RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL_ONLY,
    )


def _check_stream_options(request: GenerationRequest) -> None:
    """Refuse options that would have no effect."""
    options = request.stream_options
    if options is None:
        return
    if not request.stream:
        raise BadRequestError("stream_options needs stream=true.", "stream_options")
    if options.continuous_usage_stats and not options.include_usage:
        name = "stream_options.continuous_usage_stats"
        raise BadRequestError(f"{name} needs include_usage=true.", name)


def _check_bounds(request: GenerationRequest, settings: ServerSettings) -> None:
    """Refuse what is larger than the server allows."""
    if request.n is not None and request.n > settings.max_n:
        raise BadRequestError(f"n={request.n} must be at most {settings.max_n} on this server.", "n")
    for name in ("stop", "stop_token_ids", "bad_words"):
        values = getattr(request, name)
        values = [values] if isinstance(values, str) else values or []
        if len(values) > settings.max_stop_strings:
            raise BadRequestError(
                f"{name} has {len(values)} entries; at most {settings.max_stop_strings} are allowed on this server.",
                name,
            )
        for value in values:
            if isinstance(value, str) and len(value) > settings.max_stop_length:
                raise BadRequestError(
                    f"{name}: an entry has {len(value)} characters; at most {settings.max_stop_length} are allowed on "
                    "this server.",
                    name,
                )


def _structured_outputs(
    request: GenerationRequest, settings: ServerSettings, forced_schema: dict[str, Any] | None
) -> StructuredOutputsParams | None:
    """Return what the output must look like: by response_format, structured_outputs or tool_choice, but one of them."""
    wanted: dict[str, dict[str, Any]] = {}
    if isinstance(request.response_format, ResponseFormatJsonObject):
        wanted["response_format"] = {"json_object": True}
    elif isinstance(request.response_format, ResponseFormatJsonSchema):
        wanted["response_format"] = {"json": request.response_format.json_schema.schema_}
    if request.structured_outputs is not None:
        fields = request.structured_outputs.model_dump(by_alias=True, exclude_none=True)
        if len(fields) != 1:
            raise BadRequestError(
                f"structured_outputs must have exactly one of json, regex, choice, grammar, json_object; it has "
                f"{', '.join(fields) or 'none'}.",
                "structured_outputs",
            )
        wanted["structured_outputs"] = fields
    if forced_schema is not None:
        wanted["tool_choice"] = {"json": forced_schema}
    if not wanted:
        return None
    if len(wanted) > 1:
        names = list(wanted)
        raise BadRequestError(f"{' and '.join(names)} both say what the output looks like: give one.", names[-1])
    ((name, fields),) = wanted.items()
    check_size(name, list(fields.values()), settings)
    return StructuredOutputsParams(**fields)


def aliases(request: CompletionRequest | ChatCompletionRequest) -> dict[str, str]:
    """Return the engine's names of parameters -> those of `request`, where they differ: errors name the latter."""
    names = {"prompt_token_ids": "prompt"}
    if request.response_format is not None:
        names["structured_outputs"] = "response_format"
    if isinstance(request, ChatCompletionRequest):
        names |= {"prompt": "messages", "prompt_token_ids": "messages", "logprobs": "top_logprobs"}
        if request.max_tokens is None:
            names["max_tokens"] = "max_completion_tokens"
        if request.response_format is None and request.structured_outputs is None:
            names["structured_outputs"] = "tools"  # the schema that tool_choice made of them
    return names


def check_size(name: str, value: Any, settings: ServerSettings) -> None:
    """Raise BadRequestError if `value`, as JSON, is larger than a schema may be, or is no valid Unicode."""
    try:
        size = len(json.dumps(value, ensure_ascii=False).encode())
    except (UnicodeEncodeError, RecursionError) as error:
        raise BadRequestError(f"{name} is nested too deeply, or no valid Unicode.", name) from error
    if size > settings.max_schema_bytes:
        raise BadRequestError(
            f"{name} has {size} bytes as JSON; at most {settings.max_schema_bytes} are allowed on this server.", name
        )
