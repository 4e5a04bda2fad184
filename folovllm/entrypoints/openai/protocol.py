"""What a request may say, field by field (vLLM: `entrypoints/openai/{engine,completion,chat_completion}/protocol.py`).

Every field is checked for type and range here, and none is ignored: an unknown one is a 400, and one that OpenAI has
and this server has not is declared with the values that change nothing, so that clients may send those. null always
means the default. What depends on the model or on the server's settings is checked when parameters are made of it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, RootModel, Tag

from folovllm.sampling_params import MAX_SEED

INT32_MAX = 2**31 - 1
Int32 = Annotated[int, Field(ge=-INT32_MAX, le=INT32_MAX)]
TokenId = Annotated[int, Field(ge=0, le=INT32_MAX)]
# One bad entry is enough to know: a list may have a million.
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
NotSupported = "Not supported: only the values listed, which change nothing."
Label = "A label of the client's; changes nothing here, and appears in the log under --log-requests."


class OpenAIBaseModel(BaseModel):
    """A JSON object: unknown fields are refused, "5" is no number, NaN no value."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(OpenAIBaseModel):
    """What a stream holds besides text."""

    include_usage: bool | None = Field(None, description="One more chunk, before [DONE], with the token counts.")
    continuous_usage_stats: bool | None = Field(
        None, description="vLLM's: with include_usage, every chunk has the counts so far."
    )
    include_obfuscation: Literal[False] | None = Field(None, description=NotSupported)


class ResponseFormatText(OpenAIBaseModel):
    """Any text."""

    type: Literal["text"]


class ResponseFormatJsonObject(OpenAIBaseModel):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(OpenAIBaseModel):
    """A named JSON schema."""

    name: str = Field(max_length=64)
    description: str | None = Field(None, description="For people; the model does not see it.")
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="The schema is enforced either way.")


class ResponseFormatJsonSchema(OpenAIBaseModel):
    """JSON that the schema accepts."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[
    ResponseFormatText | ResponseFormatJsonObject | ResponseFormatJsonSchema, Field(discriminator="type")
]


class StructuredOutputs(OpenAIBaseModel):
    """vLLM's way to constrain the output: exactly one of these."""

    json_: dict[str, Any] | str | None = Field(None, alias="json", description="JSON schema.")
    regex: str | None = Field(None, description="Regular expression that the whole output matches.")
    choice: list[str] | None = Field(None, description="The output is one of these.")
    grammar: str | None = Field(None, description="Grammar in EBNF.")
    json_object: Literal[True] | None = Field(None, description="Any JSON object.")


class GenerationRequest(OpenAIBaseModel):
    """What completions and chat completions have in common. Sampling defaults are the model's own, where it has any."""

    model: str | None = Field(None, description="A name of the served model; null: that model.")
    n: int | None = Field(None, ge=1, le=INT32_MAX, description="Answers per prompt (default 1).")
    temperature: float | None = Field(None, ge=0, le=100, description="0 is greedy (default 1).")
    top_p: float | None = Field(None, gt=0, le=1, description="Keep the best tokens of this probability together.")
    top_k: int | None = Field(None, ge=-1, le=INT32_MAX, description="Keep this many best tokens; 0 or -1: all.")
    min_p: float | None = Field(None, ge=0, le=1, description="Drop tokens less likely than this times the best one.")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, description="1 is off.")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="The same seed gives the same draws.")
    stop: str | list[str] | None = Field(None, description="The output ends before these.")
    stop_token_ids: TokenIds | None = Field(None, description="The output ends at these tokens.")
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = Field(None, description="Go on after the end-of-sequence token.")
    min_tokens: int | None = Field(None, ge=0, le=INT32_MAX, description="No end before this many tokens.")
    skip_special_tokens: bool | None = Field(None, description="Leave special tokens out of the text (default true).")
    spaces_between_special_tokens: bool | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, description="Token id -> number added to its logit."
    )
    allowed_token_ids: TokenIds | None = Field(None, description="Only these tokens may be drawn.")
    bad_words: list[str] | None = Field(None, description="Words that may not be generated.")
    prompt_logprobs: int | None = Field(None, ge=-1, le=INT32_MAX, description="Log probabilities of prompt tokens.")
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    stream: bool | None = Field(None, description="Send events as tokens come.")
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = Field(None, description="Add token_ids to choices, prompt_token_ids to the first.")
    cache_salt: str | None = Field(
        None, min_length=1, max_length=1024, description="Only requests of the same salt share cached prefixes."
    )
    priority: Int32 | None = Field(None, description="Smaller runs first; needs --scheduling-policy priority.")
    user: str | None = Field(None, description=Label)


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: (
        str | Annotated[list[str], Field(fail_fast=True)] | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)]
    ) = Field(description="Text, token ids, or a list of either.")
    max_tokens: int | None = Field(None, ge=0, le=INT32_MAX, description="Default 16; 0 only with echo.")
    logprobs: int | None = Field(None, ge=0, le=INT32_MAX, description="Log probabilities of this many best tokens.")
    echo: bool | None = Field(None, description="The text begins with the prompt.")
    best_of: Literal[1] | None = Field(None, description=NotSupported)
    suffix: Literal[""] | None = Field(None, description=NotSupported)


class TextPart(OpenAIBaseModel):
    """A piece of a message's text."""

    type: Literal["text"]
    text: str


Content = str | list[TextPart]


class SystemMessage(OpenAIBaseModel):
    """Instructions. "developer" is OpenAI's newer name; templates get both as "system"."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = Field(None, description="Given to the template.")


class UserMessage(OpenAIBaseModel):
    """What a person says."""

    role: Literal["user"]
    content: Content
    name: str | None = Field(None, description="Given to the template.")


class FunctionCall(OpenAIBaseModel):
    """Which function, with what."""

    name: str
    arguments: str = Field(description="A JSON object, as text.")


class MessageToolCall(OpenAIBaseModel):
    """A call that the model made in an earlier turn."""

    id: str
    type: Literal["function"]
    function: FunctionCall
    index: int | None = Field(None, description="Of the stream it came in; changes nothing.")


class AssistantMessage(OpenAIBaseModel):
    """What the model said: content, tool calls, or both."""

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = Field(None, description="Given to the template.")
    tool_calls: list[MessageToolCall] | None = None
    reasoning_content: str | None = Field(None, description="Given to the template.")
    refusal: None = Field(None, description=NotSupported)
    audio: None = Field(None, description=NotSupported)
    function_call: None = Field(None, description=NotSupported)
    annotations: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description=NotSupported)


class ToolMessage(OpenAIBaseModel):
    """What a tool answered."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = Field(None, description="Given to the template.")


ChatMessage = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage,
    Field(discriminator="role"),
]


class FunctionDefinition(OpenAIBaseModel):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of the arguments: an object.")
    strict: bool | None = Field(
        None, description="true needs tool_choice 'required' or a named function, whose calls always follow the schema."
    )


class Tool(OpenAIBaseModel):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(OpenAIBaseModel):
    """A function by its name."""

    name: str


class NamedToolChoice(OpenAIBaseModel):
    """This function is to be called."""

    type: Literal["function"]
    function: NamedFunction


class TemplateFields(OpenAIBaseModel):
    """How a conversation becomes a prompt."""

    messages: list[ChatMessage] = Field(min_length=1)
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    add_generation_prompt: bool | None = Field(
        None, description="End the prompt where the answer begins (default true)."
    )
    continue_final_message: bool | None = Field(
        None, description="Go on writing the last message; not with add_generation_prompt=true."
    )
    chat_template: str | None = Field(None, description="A Jinja template; needs --trust-request-chat-template.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="More variables of the template, such as Qwen3's enable_thinking."
    )


class ChatCompletionRequest(TemplateFields, GenerationRequest):
    """POST /v1/chat/completions."""

    max_completion_tokens: int | None = Field(None, ge=1, le=INT32_MAX, description="Default: what the context has.")
    max_tokens: int | None = Field(None, ge=1, le=INT32_MAX, description="The older name of max_completion_tokens.")
    logprobs: bool | None = Field(None, description="Log probabilities of the output tokens.")
    top_logprobs: int | None = Field(None, ge=0, le=INT32_MAX, description="And of this many best ones; with logprobs.")
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = Field(
        None, description="auto (the default with tools): the model decides; required, named: it must call."
    )
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call (default true).")
    safety_identifier: str | None = Field(None, description=Label)
    prompt_cache_key: str | None = Field(
        None, description="A hint that changes nothing: all requests share one prefix cache; cache_salt separates them."
    )
    audio: None = Field(None, description=NotSupported)
    function_call: None = Field(None, description=NotSupported)
    functions: None = Field(None, description=NotSupported)
    metadata: None = Field(None, description=NotSupported)
    modalities: list[Literal["text"]] | None = Field(None, description=NotSupported)
    prediction: None = Field(None, description=NotSupported)
    reasoning_effort: None = Field(None, description=NotSupported)
    service_tier: Literal["auto", "default"] | None = Field(None, description=NotSupported)
    store: Literal[False] | None = Field(None, description=NotSupported)
    verbosity: None = Field(None, description=NotSupported)
    web_search_options: None = Field(None, description=NotSupported)


class TokenizeCompletionRequest(OpenAIBaseModel):
    """POST /tokenize with text."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = Field(None, description="Let the tokenizer add its own (default true).")
    return_token_strs: bool | None = Field(None, description="The tokens' texts as well.")


class TokenizeChatRequest(TemplateFields):
    """POST /tokenize with a conversation."""

    model: str | None = None
    add_special_tokens: bool | None = Field(None, description="The template adds its own (default false).")
    return_token_strs: bool | None = Field(None, description="The tokens' texts as well.")


def _kind_of_tokenize(body: Any) -> str:
    """Return a tag; one that no field is called, so that errors can tell tags from fields."""
    is_chat = "messages" in body if isinstance(body, dict) else isinstance(body, TokenizeChatRequest)
    return "<conversation>" if is_chat else "<text>"


TokenizeBody = Annotated[
    Annotated[TokenizeCompletionRequest, Tag("<text>")] | Annotated[TokenizeChatRequest, Tag("<conversation>")],
    Discriminator(_kind_of_tokenize),
]


class TokenizeRequest(RootModel[TokenizeBody]):
    """Which of the two: the one with messages is a conversation."""


class DetokenizeRequest(OpenAIBaseModel):
    """POST /detokenize."""

    model: str | None = None
    tokens: TokenIds


class ErrorInfo(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = Field(description="The field of the request that is to blame.")
    code: str | None


class ErrorResponse(BaseModel):
    """Every answer that is no success."""

    error: ErrorInfo
