"""LLM: offline inference, a list of prompts in, a list of outputs out (vLLM: `entrypoints/llm.py`)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from tqdm.auto import tqdm

from folovllm.engine.arg_utils import EngineArgs
from folovllm.engine.llm_engine import LLMEngine
from folovllm.engine.processor import PromptType
from folovllm.outputs import RequestOutput
from folovllm.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
"""One message of a conversation: {"role": "user", "content": "..."}."""


class LLM:
    """A model, loaded and ready to generate.

    >>> llm = LLM("smollm2-135m-instruct")
    >>> llm.generate(["The capital of France is"], SamplingParams(max_tokens=5))[0].outputs[0].text
    """

    def __init__(self, model: str, **engine_args: Any) -> None:
        """Load `model`: a folder, `.gguf` file, hub id or built-in name.

        Args:
            model: see EngineArgs.
            engine_args: the other fields of EngineArgs.

        Raises:
            TypeError: an unknown keyword.
            ValueError: a value outside its range, or a model that cannot be loaded.
        """
        self.llm_engine = LLMEngine.from_engine_args(EngineArgs(model=model, **engine_args))
        self._request_counter = itertools.count()

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the model's tokenizer."""
        return self.llm_engine.get_tokenizer()

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the sampling parameters used where none are given."""
        return self.llm_engine.get_default_sampling_params()

    def generate(
        self,
        prompts: PromptType | Sequence[PromptType],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Generate for every prompt and return the outputs in the order of the prompts.

        Args:
            prompts: text, {"prompt_token_ids": [...]}, or a list of those.
            sampling_params: one for all prompts, or one per prompt; None: the model's defaults.
            use_tqdm: show a progress bar.
            priority: one number per prompt, smaller first; only with scheduling_policy="priority".

        Raises:
            ValueError: a prompt or parameter is wrong; all are checked before any work starts. Or a request for
                structured output could not be done: then all others have been.
        """
        prompt_list = _as_prompt_list(prompts)
        params_list = self._as_params_list(sampling_params, len(prompt_list))
        priorities = self._check_priority(priority, len(prompt_list))
        checked = []
        for i, (prompt, params, rank) in enumerate(zip(prompt_list, params_list, priorities, strict=True)):
            try:
                text, request = self.llm_engine.process_request(
                    str(next(self._request_counter)), prompt, params, priority=rank
                )
            except ValueError as error:
                where = f"prompt {i} of {len(prompt_list)}: " if len(prompt_list) > 1 else ""
                raise ValueError(f"{where}{error}") from error
            # The clone is the processor's; the caller's object stays as it is.
            request.sampling_params.output_kind = RequestOutputKind.FINAL_ONLY
            checked.append((text, request))
        for text, request in checked:
            self.llm_engine.add_processed_request(text, request)
        return self._run(len(checked), [request.request_id for _, request in checked], use_tqdm)

    def chat(
        self,
        messages: list[Message] | list[list[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or a list of them; see generate.

        Args:
            messages: [{"role": ..., "content": ...}, ...], or a list of such lists.
            sampling_params: see generate.
            use_tqdm: see generate.
            chat_template: a Jinja template to use in place of the model's.
            add_generation_prompt: end the prompt where the assistant's answer begins.
            continue_final_message: go on writing the last message instead of answering it.
            chat_template_kwargs: more variables for the template.

        Raises:
            ValueError: no conversation, a malformed one, or no chat template.
        """
        if not messages:
            raise ValueError("messages=[] is empty: give at least one message.")
        conversations = cast("list[list[Message]]", messages if isinstance(messages[0], list) else [messages])
        prompts = [
            self.preprocess_chat(
                conversation,
                chat_template,
                add_generation_prompt,
                continue_final_message,
                chat_template_kwargs,
            )
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm)

    def preprocess_chat(
        self,
        messages: list[Message],
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> PromptType:
        """Return the prompt for one conversation: its text and token ids, ready for generate.

        Raises:
            ValueError: a malformed conversation, or a model without chat template.
        """
        _check_messages(messages)
        tokenizer = self.get_tokenizer()
        if chat_template is None and not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "This model has no chat template. Pass chat_template=..., or use generate() with a plain prompt."
            )
        try:
            text = tokenizer.apply_chat_template(
                messages,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **(chat_template_kwargs or {}),
            )
        except Exception as error:  # templates raise what they like; jinja2 errors are not ValueErrors
            raise ValueError(f"messages: the chat template refused them: {error}") from error
        # The template writes special tokens itself; a second BOS would be wrong.
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        return {"prompt_token_ids": list(token_ids), "prompt": text}

    def _as_params_list(
        self, sampling_params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
    ) -> Sequence[SamplingParams]:
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        if isinstance(sampling_params, SamplingParams):
            return [sampling_params] * num_prompts
        if len(sampling_params) != num_prompts:
            raise ValueError(
                f"sampling_params has {len(sampling_params)} entries for {num_prompts} prompts; "
                "give one for all or one per prompt."
            )
        return sampling_params

    def _check_priority(self, priority: Sequence[int] | None, num_prompts: int) -> Sequence[int]:
        if priority is None:
            return [0] * num_prompts
        if self.llm_engine.vllm_config.scheduler_config.policy != "priority":
            raise ValueError("priority needs scheduling_policy='priority'; the engine runs 'fcfs'.")
        if len(priority) != num_prompts:
            raise ValueError(f"priority has {len(priority)} entries for {num_prompts} prompts; give one per prompt.")
        return priority

    def _run(self, num_requests: int, request_ids: list[str], use_tqdm: bool) -> list[RequestOutput]:
        """Step until every request has ended; on any exception, abort what is left so that the engine stays usable."""
        finished: dict[str, RequestOutput] = {}
        num_tokens = 0
        try:
            with tqdm(total=num_requests, desc="Prompts", unit="prompt", disable=not use_tqdm) as bar:
                while self.llm_engine.has_unfinished_requests():
                    for output in self.llm_engine.step():
                        if not output.finished:
                            continue
                        finished[output.request_id] = output
                        num_tokens += sum(len(sample.token_ids) for sample in output.outputs)
                        elapsed = bar.format_dict["elapsed"] or 1e-9
                        bar.set_postfix_str(f"{num_tokens / elapsed:.1f} output tok/s", refresh=False)
                        bar.update(1)
        except BaseException:
            self.llm_engine.abort_request([i for i in request_ids if i not in finished])
            raise
        outputs = [finished[request_id] for request_id in request_ids]
        for i, output in enumerate(outputs):
            for sample in output.outputs:
                if sample.finish_reason == "error":
                    raise ValueError(f"prompt {i} of {num_requests}: {sample.stop_reason}")
        return outputs


def _as_prompt_list(prompts: PromptType | Sequence[PromptType]) -> list[PromptType]:
    """Return a list of prompts for one prompt or several."""
    if isinstance(prompts, (str, dict)):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise ValueError(f"prompts={prompts!r} must be text, a dict with prompt_token_ids, or a list of those.")
    if prompts and all(isinstance(item, int) for item in prompts):
        return [cast("PromptType", {"prompt_token_ids": list(cast("Sequence[int]", prompts))})]
    return list(cast("Sequence[PromptType]", prompts))


def _check_messages(messages: list[Message]) -> None:
    """Raise ValueError unless every message has a role and text content."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a non-empty list of {'role': ..., 'content': ...}.")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"messages[{i}]={message!r} must be a dict with a 'role'.")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"messages[{i}]: content={message.get('content')!r} must be text.")
