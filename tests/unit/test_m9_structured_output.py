"""Structured output without a model: what is accepted and refused, grammars and masks, waiting for a compilation."""

from __future__ import annotations

import json
import random
import re
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from folovllm.core.sched.grammar import Grammar, GrammarCompiler, GrammarError
from folovllm.core.sched.scheduler import Scheduler
from folovllm.engine.serial import AddRequests, decode_to_core, encode
from folovllm.outputs import FinishReason
from folovllm.request import EngineCoreRequest, Request, RequestStatus
from folovllm.sample.ops import grammar_mask
from folovllm.sample.ops.grammar_mask import NO_TOKEN, GrammarMask
from folovllm.sample.sampler import Sampler
from folovllm.sampling_params import MAX_CHOICES, MAX_GRAMMAR_BYTES, SamplingParams, StructuredOutputsParams
from folovllm.structured_output.backend_xgrammar import CompiledGrammar, XgrammarBackend, make_spec, validate
from folovllm.structured_output.compile_pool import CompilePool
from folovllm.structured_output.json_schema import FORMATS, MAX_ONE_OF, normalize_json_schema
from folovllm.structured_output.regex import normalize_regex
from tests.byte_tokenizer import EOS_ID, make_byte_tokenizer
from tests.core_utils import create_scheduler, make_output, make_request
from tests.unit.test_m1_sampler import GREEDY, make_metadata

VOCAB_SIZE = 320
DIGITS = StructuredOutputsParams(regex="[0-9]+")


@pytest.fixture(scope="module")
def backend() -> XgrammarBackend:
    return XgrammarBackend(make_byte_tokenizer(), VOCAB_SIZE)


# ---- Parameters ----


@pytest.mark.badinput
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one"),
        ({"json_object": False}, "exactly one"),
        ({"regex": "a", "choice": ["a"]}, "exactly one"),
        ({"json": 5}, "json=5 must be a str or dict"),
        ({"json": {"const": {1, 2}}}, "structured_outputs.json"),
        ({"regex": ""}, "0 bytes"),
        ({"regex": "a" * (MAX_GRAMMAR_BYTES + 1)}, "65537 bytes"),
        ({"regex": "\ud800"}, "surrogates"),
        ({"grammar": ["root"]}, "must be a str"),
        ({"choice": []}, "1 to 4096"),
        ({"choice": ["a", ""]}, "non-empty"),
        ({"choice": ["a", 1]}, "list of str"),
        ({"choice": ["x"] * (MAX_CHOICES + 1)}, "1 to 4096"),
        ({"json_object": 1}, "json_object"),
    ],
)
def test_params_are_checked_on_construction(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StructuredOutputsParams(**fields)


@pytest.mark.badinput
def test_sampling_params_refuse_what_does_not_go_with_structure() -> None:
    with pytest.raises(ValueError, match="ignore_eos"):
        SamplingParams(structured_outputs=DIGITS, ignore_eos=True)
    with pytest.raises(ValueError, match="must be a StructuredOutputsParams"):
        SamplingParams(structured_outputs={"regex": "a"})  # type: ignore[arg-type]


def test_params_are_copied_with_the_sampling_params_and_travel_to_the_core() -> None:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(json={"type": "object"}))
    clone = params.clone()
    assert clone.structured_outputs is not None and isinstance(clone.structured_outputs.json, dict)
    clone.structured_outputs.json["type"] = "array"
    assert params.structured_outputs == StructuredOutputsParams(json={"type": "object"})
    message = AddRequests([EngineCoreRequest("r", [1], params, 0.0)])
    assert decode_to_core(encode(message)) == message


@pytest.mark.badinput
def test_without_xgrammar_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(ValueError, match=r"folovllm\[structured\]"):
        validate(DIGITS)


@pytest.mark.badinput
@pytest.mark.parametrize(
    ("params", "message"),
    [
        (StructuredOutputsParams(regex="a(?=b)"), "Lookahead"),
        (StructuredOutputsParams(regex="a("), "Regex"),
        (StructuredOutputsParams(grammar="root ::= foo"), '"foo" is not defined'),
        (StructuredOutputsParams(grammar="x ::= y"), "root"),
        (StructuredOutputsParams(grammar="root ::= " + "(" * 20000), "."),
        (StructuredOutputsParams(json="{"), "not JSON"),
        (StructuredOutputsParams(json='{"type":"array","items":' * 2000 + "{}" + "}" * 2000), "nested"),
        (StructuredOutputsParams(json={"type": "strin"}), "strin"),
    ],
)
def test_a_bad_specification_is_refused_in_the_front(params: StructuredOutputsParams, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        validate(params)
    assert "/project/" not in str(caught.value)


# ---- JSON schemas ----

REFS = {"a": {"type": "object", "properties": {"n": {"$ref": "#/$defs/a"}}}}


@pytest.mark.badinput
@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"not": {"type": "string"}}, "'not'"),
        ({"if": {}, "then": {}}, "'if'"),
        ({"type": "object", "dependentRequired": {}}, "'dependentRequired'"),
        ({"type": "array", "contains": {}}, "'contains'"),
        ({"type": "array", "uniqueItems": True}, "'uniqueItems'"),
        ({"type": "array", "items": [{}]}, "#/items"),
        ({"type": "number", "multipleOf": 3}, "multipleOf"),
        ({"type": "integer", "multipleOf": 5000}, "multipleOf"),
        ({"type": "integer", "multipleOf": 3, "minimum": 4}, "'multipleOf' with 'minimum'"),
        ({"type": "integer", "exclusiveMinimum": True}, "must be a number"),
        ({"type": "string", "format": "iri"}, "format='iri'"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, "'pattern' with 'maxLength'"),
        ({"type": "string", "pattern": 'a"'}, "inside a JSON string"),
        ({"type": "string", "minimum": 3}, "'minimum' says nothing about"),
        ({"type": "object", "required": ["x"]}, "'x'"),
        ({"type": "object", "minProperties": -1}, "minProperties"),
        ({"allOf": [{"type": "object"}, {"required": ["a"]}]}, "'allOf'"),
        ({"allOf": [{"type": "integer"}], "minimum": 3}, "'minimum' beside 'allOf'"),
        ({"anyOf": [{"type": "integer"}], "minimum": 3}, "'minimum' beside 'anyOf'"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "'oneOf'"),
        ({"$ref": "#/$defs/a", "minimum": 3, "$defs": REFS}, "'minimum' beside"),
        ({"$ref": "http://x/y"}, "must point into this schema"),
        ({"$ref": "#/$defs/b", "$defs": REFS}, "points to no schema"),
        ({"$ref": "#/$defs/a/examples/0", "$defs": {"a": {"examples": [{"not": {}}]}}}, "points to no schema"),
        ({"type": "integer", "enum": [1, "x"]}, "'x' is not of type"),
        ({"enum": []}, "non-empty"),
        ({"properties": {"a": {"items": {"$dynamicRef": "#"}}}}, "#/properties/a/items: '.dynamicRef'"),
        (5, "must be"),
    ],
)
def test_json_schemas_that_xgrammar_would_ignore_are_refused_by_name(schema: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        normalize_json_schema(json.dumps(schema))


SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}}, "required": ["b"]},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}},
    {"type": "object", "additionalProperties": {"type": "null"}, "minProperties": 1, "maxProperties": 2},
    {"type": "object", "patternProperties": {"^[ab]+$": {"type": "boolean"}}},
    {"type": "object", "propertyNames": {"pattern": "^a"}},
    {"type": "object"},
    {"required": ["a"], "properties": {"a": {"enum": [1, 2.5, None, 'q"', [1, {"x": True}]]}}},
    {
        "type": "array",
        "items": {"type": "number", "minimum": -1.5, "exclusiveMaximum": 7},
        "minItems": 1,
        "maxItems": 3,
    },
    {"type": "array"},
    {"prefixItems": [{"type": "boolean"}, {"const": "x"}], "minItems": 2},
    {"minItems": 2, "maxItems": 2},
    {"type": "integer", "minimum": 3, "maximum": 12},
    {"type": "integer", "multipleOf": 7},
    {"maximum": 5},
    {"type": ["string", "null", "integer"], "maxLength": 2, "minimum": 4},
    {"minLength": 2, "maxLength": 3},
    {"type": "string", "pattern": "^[ -~]{1,4}$"},
    {"type": "string", "pattern": "[a-c]+\\d?"},
    {"type": "string", "pattern": "^.x\\w$"},
    *({"type": "string", "format": name} for name in sorted(FORMATS)),
    {"anyOf": [{"type": "boolean"}, {"type": "array", "items": {"type": "integer"}}]},
    {"oneOf": [{"type": "boolean"}, {"type": "integer", "minimum": 5}]},
    {
        "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
        "discriminator": {"propertyName": "kind"},
        "$defs": {
            kind: {
                "type": "object",
                "properties": {"kind": {"const": kind}, "age": {"type": "integer", "minimum": 0}},
                "required": ["kind"],
            }
            for kind in ("cat", "dog")
        },
    },
    {"allOf": [{"type": "boolean"}]},
    {"$ref": "#/$defs/a", "$defs": REFS},
    {"type": "object", "properties": {"self": {"$ref": "#"}, "x": {"$ref": "#/properties/y"}, "y": {"type": "null"}}},
    {"const": {"a": [1, "é"]}},
]


def walk(backend: XgrammarBackend, params: StructuredOutputsParams, seed: int, max_tokens: int = 400) -> str | None:
    """Return a text that random tokens among the allowed ones make, None if it does not end."""
    rng = random.Random(seed)
    grammar = backend.compile(make_spec(params)).make_grammar({EOS_ID})
    ids: list[int] = []
    tokenizer = make_byte_tokenizer()
    likely = {EOS_ID, *(tokenizer.convert_tokens_to_ids(c) for c in ',"]}:')}
    for _ in range(max_tokens):
        bitmask = backend.allocate_bitmask(1)
        grammar.fill_bitmask(bitmask, 0)
        bits = np.unpackbits(bitmask.view(np.uint8), bitorder="little")[:VOCAB_SIZE]
        allowed = np.flatnonzero(bits).tolist()
        assert allowed, f"a dead end after {tokenizer.decode(ids)!r}"
        ends = [i for i in allowed if i in likely]
        token = rng.choice(ends if ends and rng.random() < 0.6 else allowed)
        assert grammar.accept_token(token)
        if grammar.is_terminated():
            assert token == EOS_ID
            return str(tokenizer.decode(ids))
        ids.append(token)
    return None


@pytest.mark.parametrize("schema", SCHEMAS, ids=[json.dumps(s)[:60] for s in SCHEMAS])
def test_whatever_a_schema_allows_is_valid(backend: XgrammarBackend, schema: dict[str, Any]) -> None:
    texts = [walk(backend, StructuredOutputsParams(json=schema), seed) for seed in range(15)]
    ended = [text for text in texts if text is not None]
    assert len(ended) >= 8
    for text in ended:
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))


def test_an_object_or_array_without_further_words_may_hold_anything(backend: XgrammarBackend) -> None:
    for schema, text in (({"type": "object"}, '{"x": [1]}'), ({"type": "array"}, "[1, {}]")):
        grammar = backend.compile(make_spec(StructuredOutputsParams(json=schema))).make_grammar({EOS_ID})
        for token in [*make_byte_tokenizer().encode(text), EOS_ID]:
            assert grammar.accept_token(token), text


# ---- Regexes, choices ----


@pytest.mark.parametrize(
    ("pattern", "rewritten"),
    [
        ("^a.c$", r"^a[^\n\r]c$"),
        (r"\.[.]", r"\.[.]"),
        (r"\:\"", ':"'),
        (r"[a\]^-]", r"[a\]^-]"),
        (r"[^\]\d]", r"[^\]\d]"),
    ],
)
def test_regexes_are_rewritten_to_mean_what_they_say(pattern: str, rewritten: str) -> None:
    assert normalize_regex(pattern) == rewritten


def test_classes_inside_json_strings_lose_what_must_be_escaped() -> None:
    assert normalize_regex(r"[ -~]", in_json=True) == r"[ -!#-\[\]-~]"
    assert normalize_regex(r"[^a].", in_json=True) == r"[^a]."


@pytest.mark.badinput
@pytest.mark.parametrize(
    ("pattern", "in_json", "message"),
    [
        ("a^b", False, r"character 1: '\^'"),
        ("a$b", False, r"'\$'"),
        (r"\Aa", False, r"\\A"),
        (r"a\Z", False, r"\\Z"),
        ("[[:alpha:]]", False, "Named and nested"),
        ("[a&&b]", False, "&&"),
        ("[a", False, "without"),
        ("[b-a]", False, "range"),
        ("a\\", False, "backslash"),
        (r"\x4", False, "hexadecimal"),
        (r"\\", True, "inside a JSON string"),
        (r"\n", True, "inside a JSON string"),
        (r"\u0022", True, "inside a JSON string"),
        (r'["\\]', True, "empty"),
    ],
)
def test_regexes_that_xgrammar_would_misread_are_refused(pattern: str, in_json: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normalize_regex(pattern, in_json)


@pytest.mark.parametrize(
    "pattern", [r"^[a-f]{2,4}-\d+$", "(yes|no)+", ".{1,6}", r"[^x\d]\s\S", r"\x41?\u00e9*z", r"a*?b|\(c\)"]
)
def test_whatever_a_regex_allows_matches(backend: XgrammarBackend, pattern: str) -> None:
    texts = [walk(backend, StructuredOutputsParams(regex=pattern), seed) for seed in range(12)]
    ended = [text for text in texts if text is not None]
    assert len(ended) >= 6
    assert all(re.fullmatch(pattern, text) for text in ended), ended


def test_choices_are_taken_letter_by_letter(backend: XgrammarBackend) -> None:
    choices = ["yes", 'no "\\n', "é日\n\x00", "yes!"]
    seen = {walk(backend, StructuredOutputsParams(choice=choices), seed) for seed in range(60)}
    assert seen == set(choices)


def test_special_tokens_are_no_text_and_ids_beyond_the_tokenizer_never_come(backend: XgrammarBackend) -> None:
    grammar = backend.compile(make_spec(StructuredOutputsParams(regex=".*"))).make_grammar({EOS_ID})
    bitmask = backend.allocate_bitmask(1)
    grammar.fill_bitmask(bitmask, 0)
    bits = np.unpackbits(bitmask.view(np.uint8), bitorder="little")
    assert bits[:3].tolist() == [0, 0, 1]  # <pad>, <s>: no; </s>: the text is complete
    assert not bits[len(make_byte_tokenizer()) :].any()


def test_stop_tokens_follow_only_a_complete_text_and_without_any_it_just_ends(backend: XgrammarBackend) -> None:
    compiled = backend.compile(make_spec(StructuredOutputsParams(regex="ab")))
    a, b = make_byte_tokenizer().convert_tokens_to_ids(["a", "b"])
    grammar = compiled.make_grammar({EOS_ID})
    assert not grammar.accept_token(EOS_ID) and grammar.accept_token(a) and grammar.accept_token(b)
    assert not grammar.is_terminated() and grammar.accept_token(EOS_ID) and grammar.is_terminated()
    endless = compiled.make_grammar(set())
    assert endless.accept_token(a) and endless.accept_token(b) and endless.is_terminated()
    assert not endless.accept_token(a)


# ---- Masks ----


@pytest.mark.parametrize("vocab_size", [64, 70, 5000])
def test_masks_forbid_the_same_tokens_everywhere(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, vocab_size, generator=generator)
    bitmask = torch.randint(-(2**31), 2**31, (2, -(-vocab_size // 32)), generator=generator).int()
    mask = GrammarMask(torch.tensor([3, 1]), bitmask)
    expected = logits.clone()
    for row, words in zip((3, 1), bitmask.tolist(), strict=True):
        for token in range(vocab_size):
            if not words[token // 32] >> (token % 32) & 1:
                expected[row, token] = float("-inf")
    by_numpy, by_torch = logits.clone(), logits.clone()
    grammar_mask.apply_grammar_mask(by_numpy, mask)
    grammar_mask.apply_grammar_mask_torch(by_torch, mask)
    assert torch.equal(by_numpy, expected) and torch.equal(by_torch, expected)
    half = logits.bfloat16()
    grammar_mask.apply_grammar_mask(half, mask)
    assert torch.equal(half.isinf(), expected.isinf())
    pytest.importorskip("triton")
    from folovllm.sample.ops.triton_grammar_mask import apply_grammar_mask_triton

    device = "cuda" if torch.cuda.is_available() else "cpu"
    by_triton = logits.to(device)
    apply_grammar_mask_triton(by_triton, mask.rows.to(device), bitmask.to(device))
    assert torch.equal(by_triton.cpu(), expected)


def test_a_row_without_a_token_is_marked_and_others_are_not() -> None:
    logits = torch.zeros(3, 40)
    bitmask = torch.tensor([[0, 0], [1 << 4, 0]], dtype=torch.int32)
    mask = GrammarMask(torch.tensor([2, 0]), bitmask)
    grammar_mask.apply_grammar_mask(logits, mask)
    assert grammar_mask.mark_dead_rows(torch.tensor([4, 9, 0]), logits, mask).tolist() == [4, 9, NO_TOKEN]


@pytest.mark.parametrize("greedy", [True, False])
def test_the_sampler_draws_no_token_that_the_grammar_allows_but_another_parameter_forbids(greedy: bool) -> None:
    only_zero = torch.tensor([[1, 0], [1, 0]], dtype=torch.int32)
    not_zero = torch.zeros(3, 40, dtype=torch.bool)
    not_zero[0, 0] = True
    metadata = make_metadata(
        3,
        40,
        allowed_token_ids_mask=not_zero,
        grammar_mask=GrammarMask(torch.tensor([0, 2]), only_zero),
        max_num_logprobs=0,
        **(GREEDY if greedy else {}),
    )
    output = Sampler()(torch.randn(3, 40), metadata)
    tokens = output.sampled_token_ids.flatten().tolist()
    assert tokens[0] == NO_TOKEN and tokens[1] >= 0 and tokens[2] == 0


# ---- Compiling in threads ----


class _Compiled(CompiledGrammar):
    """A grammar of 100 bytes."""

    def __init__(self) -> None:
        self.num_bytes = 100


class SlowCompiler:
    """Compiles at once, but "slow" when it is told to, and "bad" never."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.compiled: list[str] = []

    def __call__(self, spec: tuple[str, str]) -> CompiledGrammar:
        if spec[1].startswith("slow"):
            assert self.go_on.wait(20)
        if spec[1] == "bad":
            raise ValueError("structured_outputs: this is bad")
        self.compiled.append(spec[1])
        return _Compiled()


def poll_until(pool: CompilePool, text: str, started: float | None = None) -> CompiledGrammar:
    deadline = time.monotonic() + 10
    since = time.monotonic() if started is None else started
    while (result := pool.poll(("regex", text), since)) is None:
        assert time.monotonic() < deadline
        pool.wait(0.2)
    return result


def test_a_grammar_is_compiled_once_and_kept_while_there_is_room() -> None:
    compiler = SlowCompiler()
    pool = CompilePool(compiler, cache_bytes=250)
    for text in ("a", "b", "a"):
        pool.start(("regex", text))
        poll_until(pool, text)
    assert (pool.num_hits, pool.num_misses) == (1, 2)
    pool.start(("regex", "c"))  # b has not been used for longest
    poll_until(pool, "c")
    for text in ("a", "b"):
        pool.start(("regex", text))
        poll_until(pool, text)
    assert compiler.compiled == ["a", "b", "c", "b"]
    assert (pool.num_hits, pool.num_misses) == (2, 4)
    pool.shutdown()


def test_failures_and_what_takes_too_long_concern_those_who_wait_for_it_alone() -> None:
    compiler = SlowCompiler()
    pool = CompilePool(compiler, timeout_s=0.2)
    for text in ("slow 1", "slow 2", "slow 3", "bad"):
        pool.start(("regex", text))
    began = time.monotonic()
    time.sleep(0.25)
    for text in ("slow 1", "slow 2"):  # both threads are busy with these
        with pytest.raises(GrammarError, match=r"longer than 0.2 s \(regex \"slow"):
            pool.poll(("regex", text), began)
    with pytest.raises(GrammarError, match=r"^this is bad"):
        poll_until(pool, "bad", time.monotonic() + 5)
    pool.start(("regex", "quick"))  # a new thread works; another is stuck with slow 3
    assert poll_until(pool, "quick").num_bytes == 100
    compiler.go_on.set()
    poll_until(pool, "slow 3", time.monotonic() + 5)
    deadline = time.monotonic() + 10
    while len(compiler.compiled) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    pool.start(("regex", "slow 1"))  # what came too late is kept
    poll_until(pool, "slow 1")
    assert sorted(compiler.compiled) == ["quick", "slow 1", "slow 2", "slow 3"]
    pool.shutdown()


def test_lost_threads_are_bounded_and_threads_end_with_the_pool() -> None:
    before = threading.active_count()
    compiler = SlowCompiler()
    pool = CompilePool(compiler, timeout_s=0.0)
    for i in range(30):
        pool.start(("regex", f"slow {i}"))
        time.sleep(0.002)
        with pytest.raises(GrammarError):
            pool.poll(("regex", f"slow {i}"), 0.0)
    assert threading.active_count() - before <= 8
    compiler.go_on.set()
    pool.shutdown()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_who_gives_up_leaves_nothing_behind() -> None:
    compiler = SlowCompiler()
    pool = CompilePool(compiler)
    for text in ("slow 1", "slow 2", "never"):
        pool.start(("regex", text))
    pool.forget(("regex", "never"))
    compiler.go_on.set()
    poll_until(pool, "slow 1")
    pool.forget(("regex", "slow 2"))
    pool.start(("regex", "last"))
    poll_until(pool, "last")
    assert "never" not in compiler.compiled and not pool._jobs
    pool.shutdown()


def test_compilations_that_nobody_waits_for_hold_up_nobody() -> None:
    """Two requests whose clients have left must not keep both threads."""
    compiler = SlowCompiler()
    pool = CompilePool(compiler, timeout_s=5.0)
    for text in ("slow 1", "slow 2"):
        pool.start(("regex", text))
    deadline = time.monotonic() + 10
    while sum(job.started for job in pool._jobs.values()) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    for text in ("slow 1", "slow 2"):
        pool.forget(("regex", text))
    pool.start(("regex", "quick"))
    assert poll_until(pool, "quick").num_bytes == 100
    compiler.go_on.set()
    while len(compiler.compiled) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    pool.start(("regex", "slow 1"))  # it was kept all the same
    assert poll_until(pool, "slow 1").num_bytes == 100 and compiler.compiled.count("slow 1") == 1
    pool.shutdown()


def test_a_thread_that_comes_back_takes_what_waits() -> None:
    compiler = SlowCompiler()
    pool = CompilePool(compiler, timeout_s=30.0)
    for i in range(8):
        pool.start(("regex", f"slow {i}"))
        deadline = time.monotonic() + 10
        while not pool._jobs[("regex", f"slow {i}")].started and time.monotonic() < deadline:
            time.sleep(0.001)
        pool.forget(("regex", f"slow {i}"))
    pool.start(("regex", "quick"))
    pool.wait(0.05)
    assert pool.poll(("regex", "quick"), time.monotonic()) is None  # every thread is lost
    compiler.go_on.set()
    assert poll_until(pool, "quick").num_bytes == 100
    pool.shutdown()


def test_a_large_one_of_is_checked_quickly() -> None:
    """In front of everything else: this is plain Python, which would hold up all streams."""
    kinds = {
        f"kind{i}": {"type": "object", "properties": {"k": {"const": i}}, "required": ["k"]} for i in range(MAX_ONE_OF)
    }
    refs = [{"$ref": f"#/$defs/{name}"} for name in kinds]
    schema = {"$defs": kinds, "type": "object", "properties": {f"p{i}": {"oneOf": refs} for i in range(12)}}
    started = time.perf_counter()
    normalize_json_schema(schema)
    assert time.perf_counter() - started < 2.0  # 0.4 s; twice as much as is allowed where each pair is looked at anew
    with pytest.raises(ValueError, match="'oneOf' has 257 schemas, at most 256 may be: use anyOf"):
        normalize_json_schema({"oneOf": [{"const": i} for i in range(MAX_ONE_OF + 1)]})


def test_compiling_lets_other_threads_run(backend: XgrammarBackend) -> None:
    """The engine's thread must not stand still: xgrammar has to let go of Python's lock."""
    schema = {"enum": [f"value {i} {i * i}" for i in range(2500)]}
    spec = make_spec(StructuredOutputsParams(json=json.dumps(schema)))
    seconds: list[float] = []
    thread = threading.Thread(target=lambda: seconds.append(_timed(lambda: backend.compile(spec))))
    thread.start()
    ticks = 0
    while thread.is_alive():
        time.sleep(0.001)
        ticks += 1
    thread.join(30)
    assert ticks > 1000 * seconds[0] / 10, f"{ticks} ticks of 1 ms in {seconds[0]:.3f} s"


def _timed(call: Any) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


# ---- The scheduler ----


class CountingGrammar(Grammar):
    """Allows `length` tokens above 0, then nothing."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.accepted: list[int] = []

    def accept_token(self, token_id: int) -> bool:
        if token_id == 0 or len(self.accepted) == self.length:
            return False
        self.accepted.append(token_id)
        return True

    def is_terminated(self) -> bool:
        return len(self.accepted) == self.length


class FakeCompiler(GrammarCompiler):
    """Has a request's grammar when it is put into `ready`, an error when its id is in `errors`."""

    def __init__(self, length: int = 100) -> None:
        self.length = length
        self.started: list[str] = []
        self.ready: set[str] = set()
        self.errors: dict[str, str] = {}
        self.forgotten: list[str] = []

    def start(self, request: Request) -> None:
        self.started.append(request.request_id)

    def poll(self, request: Request) -> Grammar | None:
        if request.request_id in self.errors:
            raise GrammarError(self.errors[request.request_id])
        return CountingGrammar(self.length) if request.request_id in self.ready else None

    def forget(self, request: Request) -> None:
        self.forgotten.append(request.request_id)

    def fill_bitmask(self, grammars: Sequence[Grammar]) -> Any:
        return np.full((len(grammars), 1), -1, dtype=np.int32)

    def wait(self, timeout_s: float) -> None:
        pass

    def shutdown(self) -> None:
        pass


def make_scheduler(compiler: FakeCompiler | None, **kwargs: Any) -> Scheduler:
    scheduler = create_scheduler(**kwargs)
    scheduler.grammar_compiler = compiler
    return scheduler


def structured(request_id: str, length: int = 5, **kwargs: Any) -> Request:
    return make_request(request_id, range(length), structured_outputs=DIGITS, **kwargs)


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_requests_wait_for_their_grammar_in_their_place_and_others_pass(policy: str) -> None:
    compiler = FakeCompiler()
    scheduler = make_scheduler(compiler, max_num_seqs=2, policy=policy)
    ids = ["s0", "p1", "s2", "p3", "p4"]
    for i, name in enumerate(ids):
        make = structured if name[0] == "s" else (lambda n, **k: make_request(n, range(5), **k))
        scheduler.add_request(make(name, arrival_time=float(i), max_tokens=1))
    assert compiler.started == ["s0", "s2"]
    output = scheduler.schedule()
    assert list(output.num_scheduled_tokens) == ["p1", "p3"]
    assert [r.request_id for r in scheduler.waiting] == ["s0", "s2", "p4"]
    assert scheduler.requests["s0"].status == RequestStatus.WAITING_FOR_GRAMMAR
    assert scheduler.get_request_counts() == (2, 3)
    scheduler.update_from_output(output, make_output(output))
    compiler.ready = {"s2"}
    output = scheduler.schedule()
    assert list(output.num_scheduled_tokens) == ["s2", "p4"]
    assert output.structured_output_request_ids == ["s2"]
    assert scheduler.get_grammar_bitmask(output).grammar_bitmask.shape == (1, 1)


def test_a_grammar_that_fails_ends_its_request_alone_with_the_reason() -> None:
    compiler = FakeCompiler()
    scheduler = make_scheduler(compiler)
    for name in ("bad", "good"):
        scheduler.add_request(structured(name))
    compiler.errors["bad"], compiler.ready = "too slow", {"good"}
    output = scheduler.schedule()
    assert list(output.num_scheduled_tokens) == ["good"]
    outputs = scheduler.update_from_output(output, make_output(output))[0].outputs
    assert [(o.request_id, o.finish_reason) for o in outputs] == [("bad", FinishReason.ERROR), ("good", None)]
    assert outputs[0].stop_reason == "structured_outputs: too slow"
    assert list(scheduler.requests) == ["good"]
    none = make_scheduler(None)
    none.add_request(structured("r"))
    step = none.schedule()
    assert none.update_from_output(step, make_output(step))[0].outputs[0].finish_reason == FinishReason.ERROR


def test_abort_while_compiling_frees_everything() -> None:
    compiler = FakeCompiler()
    scheduler = make_scheduler(compiler)
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    scheduler.add_request(structured("r"))
    scheduler.schedule()
    assert scheduler.finish_requests("r", RequestStatus.FINISHED_ABORTED) == ["r"]
    assert compiler.forgotten == ["r"]
    assert not scheduler.requests and not scheduler.waiting and not scheduler._compiling
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == free
    assert scheduler.schedule().finished_req_ids == {"r"}
    scheduler.wait_for_grammar(10)  # nobody waits: returns at once


def test_masks_are_for_steps_that_sample_and_the_grammar_follows_accepted_tokens() -> None:
    compiler = FakeCompiler(length=3)
    compiler.ready = {"r"}
    scheduler = make_scheduler(compiler, max_num_seqs=2, max_num_batched_tokens=4)
    request = structured("r", 10)
    scheduler.add_request(request)
    masked = []
    for token_id in (3, 4, 5, 6, 7):
        output = scheduler.schedule()
        masked.append(list(output.structured_output_request_ids))
        samples = {"r"} if masked[-1] else set()
        result = scheduler.update_from_output(output, make_output(output, token_id, only=samples))[0].outputs
    assert masked == [[], [], ["r"], ["r"], ["r"]]
    assert list(request.output_token_ids) == [5, 6, 7]
    assert result[0].finish_reason == FinishReason.STOP and scheduler._num_grammars == 0


@pytest.mark.parametrize("token_id", [0, NO_TOKEN])
def test_a_dead_end_ends_the_request_with_an_error_and_without_the_token(token_id: int) -> None:
    compiler = FakeCompiler()
    compiler.ready = {"r"}
    scheduler = make_scheduler(compiler)
    request = structured("r")
    scheduler.add_request(request)
    output = scheduler.schedule()
    result = scheduler.update_from_output(output, make_output(output, token_id))[0].outputs[0]
    assert result.finish_reason == FinishReason.ERROR and result.new_token_ids == []
    assert "after 0 tokens no token may follow" in str(result.stop_reason)
    assert not scheduler.requests and request.num_output_tokens == 0


def test_the_grammar_survives_preemption() -> None:
    compiler = FakeCompiler()
    compiler.ready = {"r"}
    scheduler = make_scheduler(compiler)
    request = structured("r")
    scheduler.add_request(request)
    for _ in range(2):
        output = scheduler.schedule()
        scheduler.update_from_output(output, make_output(output, 7))
    scheduler.reset_prefix_cache(reset_running_requests=True)
    assert request.status == RequestStatus.PREEMPTED
    output = scheduler.schedule()
    assert output.num_scheduled_tokens == {"r": 7} and output.structured_output_request_ids == ["r"]
    scheduler.update_from_output(output, make_output(output, 8))
    assert isinstance(request.grammar, CountingGrammar) and request.grammar.accepted == [7, 7, 8]


def test_async_scheduling_waits_for_the_token_in_flight_under_a_grammar_only() -> None:
    compiler = FakeCompiler()
    compiler.ready = {"s"}
    scheduler = make_scheduler(compiler, use_async=True)
    scheduler.add_request(structured("s"))
    scheduler.add_request(make_request("p", range(5)))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert list(first.num_scheduled_tokens) == ["s", "p"] and first.structured_output_request_ids == ["s"]
    assert list(second.num_scheduled_tokens) == ["p"] and second.structured_output_request_ids == []
    scheduler.update_from_output(first, make_output(first))
    third = scheduler.schedule()
    assert list(third.num_scheduled_tokens) == ["s", "p"] and third.structured_output_request_ids == ["s"]
    # Ended while its step is in flight: nobody fills a mask for it.
    scheduler.finish_requests("s", RequestStatus.FINISHED_ABORTED)
    assert scheduler.get_grammar_bitmask(third).structured_output_request_ids == []
