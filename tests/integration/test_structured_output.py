"""Structured output through the whole engine: a tiny random model for the invariants, SmolLM2 for real texts."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from folovllm import LLM, SamplingParams
from folovllm.core.sched.async_scheduler import AsyncScheduler
from folovllm.sampling_params import StructuredOutputsParams
from folovllm.structured_output.backend_xgrammar import XgrammarBackend
from folovllm.structured_output.manager import StructuredOutputManager
from tests.byte_tokenizer import EOS_ID, save_byte_tokenizer
from tests.tiny_models import save_tiny_model

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "pets": {"type": "array", "items": {"enum": ["cat", "dog", "fish"]}, "minItems": 1, "maxItems": 2},
        "home": {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]},
    },
    "required": ["name", "age", "pets", "home"],
}
LINKED = {
    "type": "object",
    "properties": {"id": {"$ref": "#/$defs/id"}, "next": {"anyOf": [{"$ref": "#/$defs/id"}, {"type": "null"}]}},
    "required": ["id", "next"],
    "$defs": {"id": {"type": "string", "pattern": "^[a-f]{3}-[0-9]{2}$"}},
}
EBNF = 'root ::= greeting ", " name "!"\ngreeting ::= "Hello" | "Good day"\nname ::= [A-Z] [a-z]{2,6}'
SPECS: list[dict[str, Any]] = [
    {"regex": "[a-c]{3,9}-[0-9]+;"},
    {"json": {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"type": "null"}}, "required": ["a"]}},
    {"choice": ["yes", "no", "yesno"]},
    {"grammar": 'root ::= "(" root ")" | [xy]{1,4}'},
    {"json": {"type": "array", "items": {"type": "integer", "minimum": 5}, "maxItems": 3}},
]


def structure(**fields: Any) -> StructuredOutputsParams:
    return StructuredOutputsParams(**fields)


# ---- A tiny random model ----

PROMPTS = [[5 + (7 * i + 3 * j) % 250 for j in range(4 + 5 * i)] for i in range(8)]


def make_params() -> list[SamplingParams]:
    """Structured requests, greedy and seeded, with two free ones among them."""
    params = []
    for i in range(len(PROMPTS)):
        spec = None if i % 4 == 3 else structure(**SPECS[i % len(SPECS)])
        greedy = i % 2 == 0
        params.append(
            SamplingParams(temperature=0.0 if greedy else 1.0, seed=i, max_tokens=14, structured_outputs=spec)
        )
    return params


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("tiny")
    save_tiny_model(path, "qwen3", vocab_size=320)
    save_byte_tokenizer(path)
    yield path
    torch.set_num_threads(before)


def start(path: Path, **kwargs: Any) -> LLM:
    defaults = {"dtype": "float32", "device": "cpu", "use_tqdm_on_load": False, "max_model_len": 64}
    return LLM(str(path), **{**defaults, **kwargs})


def run(llm: LLM, params: list[SamplingParams]) -> list[list[int]]:
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params, use_tqdm=False)]


@pytest.fixture(scope="module")
def alone(tiny: Path) -> list[list[int]]:
    """Each request by itself, in the simplest engine."""
    return run(start(tiny, max_num_seqs=1, enable_prefix_caching=False, attention_backend="torch_naive"), make_params())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"async_scheduling": True},
        {"max_num_batched_tokens": 9, "max_num_seqs": 8},
        {"max_num_batched_tokens": 9, "max_num_seqs": 8, "async_scheduling": True},
        {"num_gpu_blocks_override": 17, "block_size": 4, "max_model_len": 60},
        {"num_gpu_blocks_override": 17, "block_size": 4, "max_model_len": 60, "async_scheduling": True},
    ],
    ids=["batch", "async", "chunked", "chunked async", "preempted", "preempted async"],
)
def test_scheduling_changes_no_token(
    tiny: Path, alone: list[list[int]], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = start(tiny, **options)
    core = llm.llm_engine.engine_core.engine_core
    assert isinstance(core.scheduler, AsyncScheduler) == bool(options.get("async_scheduling"))
    preempted: list[str] = []
    preempt = core.scheduler._preempt_request
    monkeypatch.setattr(core.scheduler, "_preempt_request", lambda r: (preempted.append(r.request_id), preempt(r)))
    assert run(llm, make_params()) == alone
    assert bool(preempted) == ("num_gpu_blocks_override" in options)
    assert core.scheduler._num_grammars == 0 and not core.scheduler._compiling


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enforce_eager": True},
        {"async_scheduling": False},
        {"async_scheduling": False, "enforce_eager": True},
        {"max_num_batched_tokens": 9},
        {"num_gpu_blocks_override": 17, "block_size": 4, "max_model_len": 60},
    ],
    ids=["graphs", "eager", "sync", "sync eager", "chunked", "preempted"],
)
def test_cuda_draws_the_same_tokens(
    tiny: Path, alone: list[list[int]], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The masks go between the recorded model and the recorded sampling."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    llm = start(tiny, device="cuda", max_num_seqs=8, kv_cache_memory_bytes=1 << 24, **options)
    assert run(llm, make_params()) == alone
    assert run(llm, make_params()) == alone  # by graphs that free rows have used as well


def test_every_output_follows_and_free_rows_do_not_notice(tiny: Path, alone: list[list[int]]) -> None:
    llm = start(tiny)
    params = make_params()
    outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params, use_tqdm=False)
    for output, param in zip(outputs, params, strict=True):
        spec, sample = param.structured_outputs, output.outputs[0]
        if spec is None or sample.finish_reason == "length":
            continue
        assert sample.finish_reason == "stop" and sample.token_ids[-1] == EOS_ID
        if spec.regex is not None:
            assert re.fullmatch(spec.regex, sample.text)
        elif spec.choice is not None:
            assert sample.text in spec.choice
        elif spec.json is not None:
            jsonschema.validate(json.loads(sample.text), spec.json)
        else:
            assert re.fullmatch(r"\(*[xy]{1,4}\)*", sample.text)
    free = make_params()
    for param in free:
        param.structured_outputs = None
    without = run(llm, free)
    for i, param in enumerate(params):
        if param.structured_outputs is None:
            assert without[i] == alone[i]


def test_logprobs_are_those_before_the_mask(tiny: Path) -> None:
    llm = start(tiny)
    prompt = {"prompt_token_ids": PROMPTS[0]}
    free = SamplingParams(temperature=0, max_tokens=1, logprobs=320)
    llm.llm_engine.processor.max_logprobs = -1
    masked = SamplingParams(temperature=0, max_tokens=1, logprobs=320, structured_outputs=structure(choice=["x", "y"]))
    one, other = (llm.generate(prompt, params, use_tqdm=False)[0].outputs[0] for params in (free, masked))
    assert one.token_ids != other.token_ids and one.logprobs is not None and other.logprobs is not None
    before = {i: entry.logprob for i, entry in one.logprobs[0].items()}
    assert {i: entry.logprob for i, entry in other.logprobs[0].items()} == before


def test_samples_of_one_request_have_a_grammar_each(tiny: Path) -> None:
    llm = start(tiny)
    params = SamplingParams(n=5, seed=3, max_tokens=40, structured_outputs=structure(regex="[a-z]{2,4}[0-9]"))
    texts = [
        sample.text for sample in llm.generate({"prompt_token_ids": PROMPTS[1]}, params, use_tqdm=False)[0].outputs
    ]
    assert len(set(texts)) > 1 and all(re.fullmatch("[a-z]{2,4}[0-9]", text) for text in texts)
    pool = llm.llm_engine.engine_core.engine_core.scheduler.grammar_compiler.pool
    assert (pool.num_hits, pool.num_misses) == (4, 1)


def test_the_grammar_holds_against_every_other_parameter(tiny: Path) -> None:
    llm = start(tiny)
    params = SamplingParams(
        seed=1,
        max_tokens=30,
        logit_bias={5: 100.0, 100: 100.0},
        frequency_penalty=-2.0,
        bad_words=["a"],
        min_p=0.2,
        top_k=4,
        top_p=0.7,
        structured_outputs=structure(regex="[ab]{6}c"),
    )
    sample = llm.generate({"prompt_token_ids": PROMPTS[2]}, params, use_tqdm=False)[0].outputs[0]
    assert re.fullmatch("[ab]{6}c", sample.text)
    assert llm.get_tokenizer().convert_tokens_to_ids("a") not in sample.token_ids


@pytest.mark.badinput
@pytest.mark.parametrize(
    "others", [{"min_tokens": 20}, {"bad_words": ["b"]}, {"allowed_token_ids": [4, 9]}], ids=lambda o: next(iter(o))
)
def test_a_dead_end_is_an_error_and_others_finish(tiny: Path, others: dict[str, Any]) -> None:
    llm = start(tiny)
    dead = SamplingParams(temperature=0, max_tokens=30, structured_outputs=structure(regex="[bB]a|b{2}"), **others)
    if "bad_words" in others:
        dead.structured_outputs = structure(regex="bb")
    with pytest.raises(ValueError, match=r"prompt 1 of 2: structured_outputs: after \d tokens no token may follow"):
        llm.generate([{"prompt_token_ids": p} for p in PROMPTS[:2]], [make_params()[0], dead], use_tqdm=False)
    assert not llm.llm_engine.has_unfinished_requests()
    assert run(llm, make_params())  # usable as before


@pytest.mark.badinput
def test_what_cannot_be_compiled_is_refused_before_anything_runs(tiny: Path) -> None:
    llm = start(tiny)
    for spec, message in (
        ({"json": {"type": "object", "not": {}}}, "'not'"),
        ({"regex": "a(?=b)"}, "Lookahead"),
        ({"grammar": "root ::= nothing"}, "nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            llm.generate("x", SamplingParams(structured_outputs=structure(**spec)), use_tqdm=False)
    assert not llm.llm_engine.has_unfinished_requests()
    ids_only = start(tiny, skip_tokenizer_init=True)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        ids_only.generate(
            {"prompt_token_ids": [5]}, SamplingParams(detokenize=False, structured_outputs=structure(regex="a"))
        )


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_a_slow_grammar_fails_alone_and_others_run_meanwhile(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, async_scheduling: bool
) -> None:
    compile_spec = XgrammarBackend.compile

    def compile_slowly(self: XgrammarBackend, spec: tuple[str, str]) -> Any:
        if spec[1] == "slow":
            time.sleep(6)
        return compile_spec(self, spec)

    monkeypatch.setattr(XgrammarBackend, "compile", compile_slowly)
    llm = start(tiny, async_scheduling=async_scheduling)
    engine = llm.llm_engine
    manager = engine.engine_core.engine_core.scheduler.grammar_compiler
    assert isinstance(manager, StructuredOutputManager)
    run(llm, make_params())  # the tokenizer is read
    manager.pool._timeout_s = 1.5
    engine.add_request("slow", {"prompt_token_ids": [5]}, SamplingParams(structured_outputs=structure(regex="slow")))
    engine.add_request("aborted", {"prompt_token_ids": [5]}, SamplingParams(structured_outputs=structure(regex="slow")))
    for i, params in enumerate(make_params()):
        engine.add_request(str(i), {"prompt_token_ids": PROMPTS[i]}, params)
    finished: dict[str, Any] = {}
    began = time.monotonic()
    num_steps = 0
    while engine.has_unfinished_requests():
        assert time.monotonic() - began < 20
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = output.outputs[0]
        num_steps += 1
        if len(finished) == 3:
            engine.abort_request(["aborted"])
    assert list(finished)[-1] == "slow" and len(finished) == len(PROMPTS) + 1
    assert finished["slow"].finish_reason == "error" and "longer than 1.5 s" in finished["slow"].stop_reason
    assert time.monotonic() - began < 5
    assert num_steps < 500  # it does not spin while it waits
    assert not manager._waiting


# ---- SmolLM2 ----


@pytest.fixture(scope="module")
def smol() -> LLM:
    return LLM("smollm2-135m-instruct", max_model_len=512, use_tqdm_on_load=False)


@pytest.mark.network
@pytest.mark.slow
def test_smollm2_writes_what_it_is_told_to(smol: LLM) -> None:
    question = "Tell me about Anna from Rome, who is 30 and has a cat."
    specs = [
        structure(json=PERSON),
        structure(json=json.dumps(LINKED)),
        structure(json_object=True),
        structure(regex=r"[A-Z][a-z]{2,8} is \d\d years old\."),
        structure(choice=["Anna is happy", "Anna is sad"]),
        structure(grammar=EBNF),
    ]
    # Greedy and drawn; free neighbours in the same batch get the tokens that they get without.
    cases = [(spec, t) for spec in [*specs, None] for t in (0.0, 1.0)]
    params = [SamplingParams(temperature=t, seed=7, max_tokens=120, structured_outputs=s) for s, t in cases]
    prompts = [[{"role": "user", "content": question}]] * len(params)
    texts = [(o.outputs[0].text, o.outputs[0].finish_reason) for o in smol.chat(prompts, params, use_tqdm=False)]
    for (spec, _), (text, reason) in zip(cases, texts, strict=True):
        if spec is None:
            continue
        if spec.json_object:
            assert text.lstrip().startswith("{")
            if reason == "stop":
                assert isinstance(json.loads(text), dict)
            continue
        assert reason == "stop", text
        if spec.json is not None:
            schema = json.loads(spec.json) if isinstance(spec.json, str) else spec.json
            jsonschema.validate(json.loads(text), schema)
        elif spec.regex is not None:
            assert re.fullmatch(spec.regex, text)
        elif spec.choice is not None:
            assert text in spec.choice
        else:
            assert re.fullmatch(r"(Hello|Good day), [A-Z][a-z]{2,6}!", text)
