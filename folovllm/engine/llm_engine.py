"""LLMEngine: the synchronous front of the engine (vLLM: `v1/engine/llm_engine.py`).

add_request:  prompt -> Processor -> EngineCoreRequest -> OutputProcessor (text state) and EngineCore (queue)
step:         EngineCore -> EngineCoreOutputs -> OutputProcessor -> RequestOutputs
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from folovllm.config import VllmConfig
from folovllm.engine.arg_utils import EngineArgs
from folovllm.engine.core import EngineCore
from folovllm.engine.core_client import InprocClient
from folovllm.engine.output_processor import OutputProcessor
from folovllm.engine.processor import Processor, PromptType
from folovllm.executor.abstract import Executor
from folovllm.metrics.loggers import LoggingStatLogger
from folovllm.metrics.stats import IterationStats
from folovllm.outputs import RequestOutput
from folovllm.request import EngineCoreRequest
from folovllm.sampling_params import SamplingParams
from folovllm.utils.common import init_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = init_logger(__name__)


class LLMEngine:
    """Requests in at any time, one step at a time, outputs of that step out."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        executor: Executor,
        tokenizer: PreTrainedTokenizerBase | None,
        generation_config: dict[str, Any],
        log_stats: bool = False,
    ) -> None:
        """Compose an engine from parts; most callers want from_engine_args.

        Args:
            vllm_config: the checked configuration.
            executor: started, with the model loaded.
            tokenizer: None runs on token ids alone.
            generation_config: the model's generation_config.json, {} without one.
            log_stats: gather statistics, attach them to outputs, and log a line of them every ten seconds.
        """
        self.vllm_config = vllm_config
        self.log_stats = log_stats
        self.tokenizer = tokenizer
        self.processor = Processor(vllm_config, tokenizer, generation_config)
        self.output_processor = OutputProcessor(tokenizer, log_stats)
        self.executor = executor
        load_tokenizer = None if tokenizer is None else lambda: tokenizer
        self.engine_core = InprocClient(EngineCore(vllm_config, executor, log_stats, load_tokenizer))
        self.stat_logger = LoggingStatLogger() if log_stats else None
        self._front_seconds: dict[str, float] = {}

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> LLMEngine:
        """Resolve the model, load it and log the start-up report.

        Raises:
            ValueError: anything that is wrong with the arguments or the model.
        """
        from folovllm.executor.gpu_executor import UniProcExecutor

        started = time.perf_counter()
        source = engine_args.resolve_model_source()
        vllm_config = engine_args.create_engine_config(source)
        generation_config = source.generation_config()
        resolved = time.perf_counter()
        # The tokenizer first: it is quick, and a model without one should fail before its weights are read.
        tokenizer = None if engine_args.skip_tokenizer_init else source.tokenizer()
        tokenized = time.perf_counter()
        executor = UniProcExecutor(vllm_config, source, engine_args.use_tqdm_on_load)
        engine = cls(vllm_config, executor, tokenizer, generation_config, not engine_args.disable_log_stats)
        engine._front_seconds = {"resolve model": resolved - started, "tokenizer": tokenized - resolved}
        logger.info("%s", engine.startup_report)
        return engine

    @property
    def startup_report(self) -> str:
        """One block of text: model, dtype, backend and why, GiB of weights and KV cache, seconds per phase."""
        return self.engine_core.engine_core.startup_report(self._front_seconds)

    def process_request(
        self,
        request_id: str,
        prompt: PromptType,
        params: SamplingParams,
        arrival_time: float | None = None,
        priority: int = 0,
    ) -> tuple[str | None, EngineCoreRequest]:
        """Check and tokenize a request without queueing it; return (prompt text, request).

        Raises:
            ValueError: whatever is wrong with it, including that it can never fit the KV cache.
        """
        text, request = self.processor.process_inputs(request_id, prompt, params, arrival_time, priority)
        self.engine_core.check_fits(request)
        return text, request

    def add_processed_request(self, prompt_text: str | None, request: EngineCoreRequest) -> None:
        """Queue what process_request returned; n > 1 becomes n child requests."""
        for core_request in self.output_processor.add_client_request(request, prompt_text):
            self.engine_core.add_request(core_request)

    def add_request(
        self,
        request_id: str,
        prompt: PromptType,
        params: SamplingParams,
        arrival_time: float | None = None,
        priority: int = 0,
    ) -> None:
        """Check, tokenize and queue a request; see process_request."""
        self.add_processed_request(*self.process_request(request_id, prompt, params, arrival_time, priority))

    def step(self) -> list[RequestOutput]:
        """Run one step and return the outputs it brought."""
        outputs = self.engine_core.get_output()
        iteration_stats = IterationStats() if self.log_stats else None
        processed = self.output_processor.process_outputs(outputs.outputs, outputs.timestamp, iteration_stats)
        # The core knows nothing of text: requests that met a stop string still run there.
        self.engine_core.abort_requests(processed.reqs_to_abort)
        if self.stat_logger is not None:
            self.stat_logger.record(outputs.scheduler_stats, iteration_stats)
            self.stat_logger.log_if_due()
        return processed.request_outputs

    def abort_request(self, request_ids: list[str]) -> None:
        """End requests, given by the ids they were added with; unknown ids are ignored."""
        self.engine_core.abort_requests(self.output_processor.abort_requests(request_ids))

    def has_unfinished_requests(self) -> bool:
        """Return whether step() has anything left to do."""
        return self.output_processor.has_unfinished_requests()

    def get_num_unfinished_requests(self) -> int:
        """Return the number of unfinished requests, samples of n > 1 counted one by one."""
        return self.output_processor.get_num_unfinished_requests()

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer; ValueError without one."""
        if self.tokenizer is None:
            raise ValueError("skip_tokenizer_init=True: there is no tokenizer. Start the engine without it.")
        return self.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the sampling parameters that the model's makers recommend, else the defaults."""
        return self.processor.get_default_sampling_params()

    def reset_prefix_cache(self) -> bool:
        """Forget all cached blocks; False if requests still hold some."""
        return self.engine_core.reset_prefix_cache()

    def shutdown(self) -> None:
        """Free the devices; the engine is unusable afterwards."""
        self.engine_core.shutdown()
