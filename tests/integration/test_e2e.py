"""The whole engine, prompt to text: tiny models of every family and SmolLM2's real weights, against transformers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from folovllm import LLM, RequestOutputKind, SamplingParams
from folovllm.model_executor.model_loader.named import fetch_named_model
from folovllm.model_executor.models.llama import LlamaModel
from folovllm.outputs import Logprob
from tests.tiny_models import TINY_MODELS, VOCAB_SIZE, reference_greedy, save_tiny_model

SMALL = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "use_tqdm_on_load": False,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 1 << 24,
}
CHAT_PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "List three prime numbers above 100.",
    "Translate 'good morning' into Spanish.",
    "Explain gravity to a child in two sentences.",
    "Write a Python function that reverses a string.",
    "Who wrote Don Quixote, and when?",
    "What's 17 + 25? 😀 Réponds en français.",
]


def random_prompts(lengths: list[int], seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("name", TINY_MODELS)
def test_tiny_model_greedy_tokens_and_prompt_logprobs(name: str, tmp_path: Path) -> None:
    """64 greedy tokens identical to full recomputation in transformers; prompt log probabilities equal to 1e-4."""
    reference = save_tiny_model(tmp_path, name)
    llm = LLM(str(tmp_path), max_num_batched_tokens=48, **SMALL)
    prompts = random_prompts([1, 7, 100])
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, prompt_logprobs=2, logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == reference_greedy(reference, prompt, 64)
        with torch.inference_mode():
            expected = reference(torch.tensor([prompt])).logits[0].log_softmax(-1)
        assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(prompt)
        assert output.prompt_logprobs[0] is None
        for position in range(1, len(prompt)):
            entry = output.prompt_logprobs[position]
            assert entry is not None and prompt[position] in entry
            for token_id, logprob in entry.items():
                assert math.isclose(logprob.logprob, float(expected[position - 1, token_id]), abs_tol=1e-4)
        sampled = output.outputs[0].logprobs
        assert sampled is not None and all(len(entry) == 1 for entry in sampled)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    save_tiny_model(path, "qwen3")
    return path


def test_only_last_tokens_leave_the_last_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a step with prompts the model returns each request's last token, unless log probabilities want all."""
    save_tiny_model(tmp_path, "llama")
    llm = LLM(str(tmp_path), max_model_len=64, **SMALL)
    forward = LlamaModel.forward
    shapes: list[tuple[int, int]] = []

    def spy(self: LlamaModel, ids: torch.Tensor, *args: Any) -> torch.Tensor:
        hidden = forward(self, ids, *args)
        shapes.append((len(ids), len(hidden)))
        return hidden

    monkeypatch.setattr(LlamaModel, "forward", spy)
    prompts = [{"prompt_token_ids": [3, 4, 5]}, {"prompt_token_ids": [6, 7]}]
    plain = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=2, ignore_eos=True), use_tqdm=False)
    assert shapes == [(5, 2), (2, 2)]
    shapes.clear()
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, prompt_logprobs=0)
    wanted = llm.generate(prompts, params, use_tqdm=False)
    assert shapes == [(5, 5), (2, 2)]
    assert [o.outputs[0].token_ids for o in wanted] == [o.outputs[0].token_ids for o in plain]


@pytest.mark.parametrize(
    "engine_args",
    [
        {"max_num_seqs": 1},
        {"block_size": 256, "max_num_seqs": 4},
        {"block_size": 1},
        {"max_num_batched_tokens": 8},
        {"enable_prefix_caching": False},
        {"num_gpu_blocks_override": 17, "max_model_len": 160},
        {"async_scheduling": True},
        {"async_scheduling": True, "max_num_batched_tokens": 8},
        {"async_scheduling": True, "num_gpu_blocks_override": 17, "max_model_len": 160},
    ],
    ids=[
        "one at a time",
        "contiguous",
        "block of 1",
        "chunks of 8",
        "no prefix cache",
        "preemption",
        "async",
        "async, chunks of 8",
        "async, preemption",
    ],
)
def test_output_is_a_function_of_the_prompt_alone(engine_args: dict[str, int], tiny: Path) -> None:
    """Batching, block size, chunking, caching and preemption change no token, greedy or seeded."""
    prompts = [{"prompt_token_ids": p} for p in random_prompts([3, 15, 16, 17, 70, 16, 33])]
    prompts.append(prompts[4])
    params = [
        SamplingParams(temperature=0.0 if i % 2 else 1.0, seed=i, max_tokens=40, ignore_eos=True)
        for i in range(len(prompts))
    ]
    baseline_llm = LLM(str(tiny), **SMALL)
    alone = [baseline_llm.generate(p, s, use_tqdm=False)[0] for p, s in zip(prompts, params, strict=True)]
    llm = LLM(str(tiny), **(SMALL | engine_args))
    together = llm.generate(prompts, params, use_tqdm=False)
    assert [list(o.outputs[0].token_ids) for o in together] == [list(o.outputs[0].token_ids) for o in alone]
    if "num_gpu_blocks_override" in engine_args:
        assert llm.llm_engine.engine_core.engine_core.scheduler._num_preemptions > 0


def logprob_values(entries: list[dict[int, Logprob] | None] | None) -> dict[tuple[int, int], float]:
    """(position, token id) -> log probability."""
    return {(i, k): v.logprob for i, entry in enumerate(entries or []) if entry for k, v in entry.items()}


def test_async_scheduling_changes_nothing_but_the_order_of_work(tiny: Path) -> None:
    """Penalties, which need the newest token, stop tokens, found one step late, logprobs, samples, aborts."""
    prompts = [{"prompt_token_ids": p} for p in random_prompts([4, 19, 33, 16, 50, 7])]
    common = {"max_tokens": 24, "ignore_eos": True}
    params = [
        SamplingParams(temperature=0, repetition_penalty=1.5, frequency_penalty=0.7, **common),
        SamplingParams(temperature=0, logprobs=2, prompt_logprobs=1, **common),
        SamplingParams(temperature=1.2, seed=1, stop_token_ids=list(range(3, 60)), **common),
        SamplingParams(temperature=0.9, seed=2, n=3, presence_penalty=1.0, **common),
        SamplingParams(temperature=0, logit_bias={5: 100.0}, stop_token_ids=[5], min_tokens=6, **common),
        SamplingParams(temperature=1.0, seed=3, max_tokens=1),
    ]
    results, logprobs = [], []
    for overlap in (False, True):
        llm = LLM(str(tiny), async_scheduling=overlap, **SMALL)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        results.append([(s.token_ids, s.finish_reason, s.stop_reason) for o in outputs for s in o.outputs])
        logprobs.append(logprob_values(outputs[1].outputs[0].logprobs) | logprob_values(outputs[1].prompt_logprobs))
        core = llm.llm_engine.engine_core.engine_core
        assert core.async_scheduling is overlap
        assert not core._in_flight and not core.scheduler.requests
        core.scheduler.kv_cache_manager.check_integrity()
        # Two steps are in flight only if overlapping.
        llm.llm_engine.add_request("x", prompts[0], SamplingParams(temperature=0, **common))
        llm.llm_engine.step()
        assert len(core._in_flight) == int(overlap)
        llm.llm_engine.abort_request(["x"])
        assert not llm.llm_engine.has_unfinished_requests()
        # A token of the aborted request may still be in flight; the same id can be used again at once.
        llm.llm_engine.add_request("x", prompts[1], SamplingParams(temperature=0, **common))
        final = []
        while llm.llm_engine.has_unfinished_requests():
            final = llm.llm_engine.step() or final
        results[-1].append(list(final[0].outputs[0].token_ids))
    assert results[0] == results[1]
    # Another batch composition rounds differently.
    assert len(logprobs[0]) > 24 and logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_request_that_runs_into_max_model_len(overlap: bool, tiny: Path) -> None:
    """It ends with exactly max_model_len tokens, whatever it may still ask for; a step in flight does not overshoot."""
    llm = LLM(str(tiny), async_scheduling=overlap, **(SMALL | {"max_model_len": 64}))
    prompts = [{"prompt_token_ids": p} for p in random_prompts([60, 63, 40])]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (1000, 1000, None)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [len(o.outputs[0].token_ids) for o in outputs] == [4, 1, 24]
    assert {o.outputs[0].finish_reason for o in outputs} == {"length"}
    llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.check_integrity()


def test_several_samples_differ_and_repeat(tiny: Path) -> None:
    llm = LLM(str(tiny), **SMALL)
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=12, ignore_eos=True)
    prompt = {"prompt_token_ids": [5, 6, 7]}
    first, second = (llm.generate(prompt, params, use_tqdm=False)[0] for _ in range(2))
    samples = [tuple(sample.token_ids) for sample in first.outputs]
    assert [sample.index for sample in first.outputs] == [0, 1, 2]
    assert len(set(samples)) == 3
    assert samples == [tuple(sample.token_ids) for sample in second.outputs]


@pytest.mark.badinput
def test_samples_are_queued_all_or_none(tiny: Path) -> None:
    """An id that one of the n samples would need is in use: refused, and no sibling is left running."""
    engine = LLM(str(tiny), **SMALL).llm_engine
    prompt = {"prompt_token_ids": [5, 6, 7]}
    engine.add_request("1_a", prompt, SamplingParams(max_tokens=2, ignore_eos=True))
    with pytest.raises(ValueError, match="request_id='1_a'"):
        engine.add_request("a", prompt, SamplingParams(n=2, max_tokens=2))
    assert engine.get_num_unfinished_requests() == 1
    finished = []
    while engine.has_unfinished_requests():
        finished += [o.request_id for o in engine.step() if o.finished]
    assert finished == ["1_a"]


def test_eos_is_the_union_of_all_sources(tiny: Path) -> None:
    """generation_config's end-of-sequence id ends a request, with ignore_eos it does not."""
    llm = LLM(str(tiny), **SMALL)
    force_eos = {"logit_bias": {2: 100.0}, "max_tokens": 5, "temperature": 0.0}
    prompt = {"prompt_token_ids": [9, 9]}
    (stopped,) = llm.generate(prompt, SamplingParams(**force_eos), use_tqdm=False)
    assert list(stopped.outputs[0].token_ids) == [2] and stopped.outputs[0].finish_reason == "stop"
    (ignored,) = llm.generate(prompt, SamplingParams(**force_eos, ignore_eos=True), use_tqdm=False)
    assert list(ignored.outputs[0].token_ids) == [2] * 5 and ignored.outputs[0].finish_reason == "length"
    (held,) = llm.generate(prompt, SamplingParams(**force_eos, min_tokens=3), use_tqdm=False)
    tokens = list(held.outputs[0].token_ids)
    assert tokens[3:] == [2] and 2 not in tokens[:3]


@pytest.mark.badinput
def test_one_bad_prompt_stops_the_list_before_any_work(tiny: Path) -> None:
    llm = LLM(str(tiny), **SMALL)
    good = {"prompt_token_ids": [1, 2, 3]}
    params = SamplingParams(max_tokens=2)
    for bad, message in [
        ({"prompt_token_ids": []}, "prompt 1 of 3.*empty"),
        ({"prompt_token_ids": [VOCAB_SIZE]}, f"{VOCAB_SIZE}"),
        ({"prompt_token_ids": [1] * 256}, "max_model_len"),
        ("text", "tokenizer"),
    ]:
        with pytest.raises(ValueError, match=message):
            llm.generate([good, bad, good], params, use_tqdm=False)
        assert not llm.llm_engine.has_unfinished_requests()
    with pytest.raises(ValueError, match="2 entries for 3 prompts"):
        llm.generate([good] * 3, [params] * 2, use_tqdm=False)
    for name in ("enable_prefix_caching", "async_scheduling", "enforce_eager", "enable_chunked_prefill"):
        with pytest.raises(ValueError, match=f"{name}='no' must be True or False"):
            LLM(str(tiny), **(SMALL | {name: "no"}))
    with pytest.raises(ValueError, match="tokenizer='/nowhere': "):
        LLM(str(tiny), **(SMALL | {"tokenizer": "/nowhere"}))
    with pytest.raises(TypeError, match="max_modle_len"):
        LLM(str(tiny), max_modle_len=5)
    assert len(llm.generate([good], params, use_tqdm=False)) == 1


@pytest.mark.badinput
def test_a_kv_cache_that_cannot_hold_one_request_is_refused(tiny: Path) -> None:
    with pytest.raises(ValueError, match=r"max seq len.*kv_cache_memory_bytes|kv_cache_memory_bytes.*max seq len"):
        LLM(str(tiny), **(SMALL | {"kv_cache_memory_bytes": 4096}))
    with pytest.raises(ValueError, match=r"KV cache needs .* GiB free\. Lower kv_cache_memory_bytes"):
        LLM(str(tiny), device="cpu", **(SMALL | {"kv_cache_memory_bytes": 1 << 50}))


def test_abort_between_steps_leaves_the_others_alone(tiny: Path) -> None:
    engine = LLM(str(tiny), **SMALL).llm_engine
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    for request_id, prompt in zip("ab", random_prompts([10, 12]), strict=True):
        engine.add_request(request_id, {"prompt_token_ids": prompt}, params)
    for _ in range(3):
        engine.step()
    engine.abort_request(["a", "unknown"])
    finished = []
    while engine.has_unfinished_requests():
        finished += [o for o in engine.step() if o.finished]
    assert [o.request_id for o in finished] == ["b"] and len(finished[0].outputs[0].token_ids) == 20


# Real weights.


@pytest.fixture(scope="module")
def smollm2() -> LLM:
    return LLM("smollm2-135m-instruct", dtype="float32", use_tqdm_on_load=False, max_num_seqs=8)


@pytest.fixture(scope="module")
def smollm2_reference() -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    path = fetch_named_model("smollm2-135m-instruct")
    return AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32).eval()


@torch.inference_mode()
def greedy_with_cache(model: torch.nn.Module, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy tokens of a transformers model through its own KV cache; generate() would stop at, or hide, EOS."""
    out = model(torch.tensor([prompt]), use_cache=True)
    tokens = [int(out.logits[0, -1].argmax())]
    while len(tokens) < num_tokens:
        out = model(torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True)
        tokens.append(int(out.logits[0, -1].argmax()))
    return tokens


@pytest.mark.network
def test_smollm2_greedy_equals_transformers(smollm2: LLM, smollm2_reference: torch.nn.Module) -> None:
    """8 chat prompts, 64 greedy tokens each, identical to transformers in float32."""
    conversations = [[{"role": "user", "content": text}] for text in CHAT_PROMPTS]
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    outputs = smollm2.chat(conversations, params, use_tqdm=False)
    for output in outputs:
        assert output.prompt_token_ids is not None
        expected = greedy_with_cache(smollm2_reference, output.prompt_token_ids, 64)
        assert list(output.outputs[0].token_ids) == expected


@pytest.mark.network
def test_smollm2_answers_and_stops(smollm2: LLM) -> None:
    """The chat template, end-of-turn token and detokenizer work together: a short, clean answer."""
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    (output,) = smollm2.chat(messages, SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)
    answer = output.outputs[0]
    assert "Paris" in answer.text and "<|im_end|>" not in answer.text
    assert answer.finish_reason == "stop" and len(answer.token_ids) < 40


@pytest.mark.network
def test_smollm2_streams_what_it_generates(smollm2: LLM) -> None:
    """Deltas add up to the whole text, also around a stop string."""
    engine = smollm2.llm_engine
    prompt = "Count from one to ten: one, two, three,"
    whole = smollm2.generate(prompt, SamplingParams(temperature=0, max_tokens=30), use_tqdm=False)[0].outputs[0]
    stop = whole.text[12:16]
    for params in (
        SamplingParams(temperature=0, max_tokens=30, output_kind=RequestOutputKind.DELTA),
        SamplingParams(temperature=0, max_tokens=30, stop=[stop], output_kind=RequestOutputKind.DELTA),
    ):
        engine.add_request("stream", prompt, params)
        pieces = []
        while engine.has_unfinished_requests():
            pieces += [output.outputs[0].text for output in engine.step()]
        expected = whole.text[: whole.text.index(stop)] if params.stop else whole.text
        assert "".join(pieces) == expected
