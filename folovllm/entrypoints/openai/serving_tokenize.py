"""POST /tokenize and /detokenize: what the model reads, without running it (vLLM: `entrypoints/serve/tokenize`)."""

from __future__ import annotations

from typing import Any, cast

from folovllm.entrypoints.openai.protocol import DetokenizeRequest, TokenizeChatRequest, TokenizeCompletionRequest
from folovllm.entrypoints.openai.serving import OpenAIServing


class OpenAIServingTokenization:
    """The endpoints."""

    def __init__(self, serving: OpenAIServing) -> None:
        self.serving = serving

    async def create_tokenize(self, request: TokenizeCompletionRequest | TokenizeChatRequest) -> dict[str, Any]:
        """Return {count, max_model_len, tokens, token_strs}: the prompt that generating would begin with."""
        self.serving.check_model(request.model)
        renderer = self.serving.renderer
        if isinstance(request, TokenizeChatRequest):
            prompt = cast("dict[str, Any]", await renderer.render_chat(request, show_tools=True))
            tokens = prompt["prompt_token_ids"]
        else:
            tokens = await renderer.encode(request.prompt, request.add_special_tokens is not False)
        return {
            "count": len(tokens),
            "max_model_len": self.serving.max_model_len,
            "tokens": tokens,
            "token_strs": await renderer.token_strings(tokens) if request.return_token_strs else None,
        }

    async def create_detokenize(self, request: DetokenizeRequest) -> dict[str, Any]:
        """Return {prompt: the tokens' text}."""
        self.serving.check_model(request.model)
        return {"prompt": await self.serving.renderer.decode(request.tokens)}
