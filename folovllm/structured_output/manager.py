"""StructuredOutputManager: the grammars of one engine core (vLLM: `v1/structured_output/__init__.py`).

The tokenizer is loaded, and xgrammar imported, with the first request that needs them: in the pool's thread, too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from folovllm.config import VllmConfig
from folovllm.core.sched.grammar import Grammar, GrammarCompiler, GrammarError
from folovllm.request import Request
from folovllm.structured_output.backend_xgrammar import (
    CompiledGrammar,
    Spec,
    XgrammarBackend,
    XgrammarGrammar,
    make_spec,
)
from folovllm.structured_output.compile_pool import CACHE_BYTES, COMPILE_TIMEOUT_S, CompilePool


class StructuredOutputManager(GrammarCompiler):
    """Compiles grammars in threads of its own, keeps those compiled last, and fills the masks of a step."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        load_tokenizer: Callable[[], Any] | None,
        timeout_s: float = COMPILE_TIMEOUT_S,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            vllm_config: says how large the model's vocabulary is.
            load_tokenizer: called once, when it is first needed; None fails every request that asks for structure.
            timeout_s: most seconds that a request waits for its grammar.
            cache_bytes: about how much memory compiled grammars may take.
        """
        self._load_tokenizer = load_tokenizer
        self._model_config = vllm_config.model_config
        self._backend: XgrammarBackend | None = None
        self._backend_lock = threading.Lock()
        self.pool = CompilePool(self._compile, timeout_s, cache_bytes)
        # What is being compiled for whom, and since when (`time.monotonic()`).
        self._waiting: dict[Request, tuple[Spec, float]] = {}

    def _compile(self, spec: Spec) -> CompiledGrammar:
        """Compile in a thread of the pool, the backend made before if need be."""
        with self._backend_lock:
            if self._backend is None:
                if self._load_tokenizer is None:
                    raise ValueError("the engine has no tokenizer (skip_tokenizer_init=True)")
                self._backend = XgrammarBackend(self._load_tokenizer(), self._model_config.get_vocab_size())
        return self._backend.compile(spec)

    def start(self, request: Request) -> None:
        """See GrammarCompiler. The Processor has validated the specification."""
        params = request.sampling_params.structured_outputs
        assert params is not None
        spec = make_spec(params)
        self._waiting[request] = (spec, time.monotonic())
        self.pool.start(spec)

    def poll(self, request: Request) -> Grammar | None:
        """See GrammarCompiler."""
        spec, started = self._waiting[request]
        try:
            compiled = self.pool.poll(spec, started)
        except GrammarError:
            del self._waiting[request]
            raise
        if compiled is None:
            return None
        del self._waiting[request]
        return compiled.make_grammar(request.sampling_params.all_stop_token_ids)

    def forget(self, request: Request) -> None:
        """See GrammarCompiler."""
        waiting = self._waiting.pop(request, None)
        if waiting is not None:
            self.pool.forget(waiting[0])

    def fill_bitmask(self, grammars: Sequence[Grammar]) -> npt.NDArray[np.int32]:
        """See GrammarCompiler."""
        assert self._backend is not None, "no grammar without it"
        bitmask = self._backend.allocate_bitmask(len(grammars))
        for row, grammar in enumerate(grammars):
            assert isinstance(grammar, XgrammarGrammar)
            grammar.fill_bitmask(bitmask, row)
        return bitmask

    def wait(self, timeout_s: float) -> None:
        """See GrammarCompiler."""
        self.pool.wait(timeout_s)

    def shutdown(self) -> None:
        """See GrammarCompiler."""
        self._waiting.clear()
        self.pool.shutdown()
