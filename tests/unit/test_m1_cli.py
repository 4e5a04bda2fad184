"""The command `folovllm`: its flags, its endings and exit codes, and that asking for help is quick."""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import threading
import types
from typing import Any

import pytest

from folovllm.engine.arg_utils import EngineArgs
from folovllm.entrypoints.cli import chat, common, generate, streaming
from folovllm.entrypoints.cli.main import main, make_parser
from folovllm.outputs import CompletionOutput, RequestOutput
from folovllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from folovllm.version import __version__
from tests.fake_llm import FakeEngine, FakeLLM, Stdin, Terminal, use


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> FakeLLM:
    """A fake that the command loads."""
    fake = FakeLLM()
    use(monkeypatch, fake)
    return fake


def refuse_loading(args: Any) -> Any:
    raise AssertionError("the model was loaded")


ALL_FLAGS = shlex.split(
    """--max-tokens 50 --min-tokens 2 --temperature 0.5 --top-p 0.8 --top-k 40 --min-p 0.1 --sampling-seed 7
    --presence-penalty -1 --frequency-penalty 0.5 --repetition-penalty 1.1 --stop A --stop B --bad-words C
    --stop-token-ids 1,2 --stop-token-ids 3 --allowed-token-ids 1,2,3 --logit-bias 5=-1.5 --logit-bias 6=2
    --ignore-eos --include-stop-str-in-output --no-skip-special-tokens
    -n 3 --logprobs 2 --prompt-logprobs 0"""
)
ALL_PARAMS = {
    "max_tokens": 50,
    "min_tokens": 2,
    "temperature": 0.5,
    "top_p": 0.8,
    "top_k": 40,
    "min_p": 0.1,
    "seed": 7,
    "presence_penalty": -1.0,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.1,
    "stop": ["A", "B"],
    "bad_words": ["C"],
    "stop_token_ids": [1, 2, 3],
    "allowed_token_ids": [1, 2, 3],
    "logit_bias": {5: -1.5, 6: 2.0},
    "ignore_eos": True,
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "n": 3,
    "logprobs": 2,
    "prompt_logprobs": 0,
}


def parse(*argv: str) -> Any:
    return make_parser().parse_args(list(argv))


def test_every_sampling_flag_reaches_its_field() -> None:
    args = parse("generate", "hi", "--seed", "11", *ALL_FLAGS)
    assert common.sampling_overrides(args) == ALL_PARAMS
    assert args.seed == 11, "--seed is the engine's"
    params = common.build_sampling_params(FakeLLM(), ALL_PARAMS)
    assert params == SamplingParams(**ALL_PARAMS, output_kind=RequestOutputKind.DELTA)


def test_every_sampling_field_has_a_flag_or_a_reason() -> None:
    without = {
        "structured_outputs": "has a test of its own: ignore_eos excludes it",
        "detokenize": "a command line shows text",
        "output_kind": "the command's own business",
        "spaces_between_special_tokens": "slow tokenizers only",
        "bad_words_token_ids": "derived",
        "eos_token_id": "derived",
        "all_stop_token_ids": "derived",
    }
    assert {f.name for f in dataclasses.fields(SamplingParams)} == set(ALL_PARAMS) | set(without)


def test_structured_outputs_are_given_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    args = parse("generate", "hi", "--structured-outputs", '{"choice": ["yes", "no"]}')
    assert common.sampling_overrides(args) == {
        "max_tokens": 128,
        "structured_outputs": StructuredOutputsParams(choice=["yes", "no"]),
    }
    for wrong in ["yes", '["yes"]', '{"choices": ["yes"]}', '{"choice": []}', "{}"]:
        with pytest.raises(SystemExit):
            parse("generate", "hi", "--structured-outputs", wrong)
        assert "--structured-outputs" in capsys.readouterr().err


@pytest.mark.parametrize("command,max_tokens", [(("generate", "hi"), 128), (("chat",), 1024)])
def test_flags_not_given_leave_the_models_defaults(command: tuple[str, ...], max_tokens: int) -> None:
    overrides = common.sampling_overrides(parse(*command))
    assert overrides == {"max_tokens": max_tokens}
    fake = FakeLLM(top_k=20, repetition_penalty=1.05)
    params = common.build_sampling_params(fake, overrides)
    expected = dataclasses.replace(fake.defaults, max_tokens=max_tokens, output_kind=RequestOutputKind.DELTA)
    assert params == expected and params.temperature == 0.7 and params.top_k == 20


def test_zero_and_false_are_given_values() -> None:
    args = parse("generate", "hi", "--temperature", "0", "--top-k", "0", "--skip-special-tokens")
    overrides = common.sampling_overrides(args)
    assert overrides == {"max_tokens": 128, "temperature": 0.0, "top_k": 0, "skip_special_tokens": True}


def test_engine_flags_reach_engine_args_on_both_commands() -> None:
    flags = ["--model", "m", "--dtype", "float32", "--max-model-len", "99", "--seed", "3", "--enforce-eager"]
    for command in (["generate", "hi"], ["chat"]):
        engine_args = EngineArgs.from_cli_args(parse(*command, *flags))
        assert (engine_args.model, engine_args.dtype, engine_args.max_model_len) == ("m", "float32", 99)
        assert engine_args.seed == 3 and engine_args.enforce_eager
    assert EngineArgs.from_cli_args(parse("chat")).model == "smollm2-135m-instruct"


def test_load_llm_passes_the_engine_args_and_keeps_stdout_clean(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def make(**kwargs: Any) -> dict[str, Any]:
        print("loading")
        return kwargs

    module = types.ModuleType("folovllm.entrypoints.llm")
    module.LLM = make  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "folovllm.entrypoints.llm", module)
    args = parse("chat", "--model", "m", "--max-num-seqs", "5")
    kwargs: Any = common.load_llm(args)
    assert kwargs == vars(EngineArgs.from_cli_args(args)) and kwargs["max_num_seqs"] == 5
    captured = capsys.readouterr()
    assert captured.out == "" and "loading" in captured.err


@pytest.mark.badinput
@pytest.mark.parametrize(
    "argv,message",
    [
        (["generate"], "PROMPT"),
        (["generate", "hi", "--no-such-flag"], "--no-such-flag"),
        (["generate", "hi", "--max-tok", "5"], "--max-tok"),
        (["generate", "hi", "--top-k", "x"], "--top-k"),
        (["generate", "hi", "--stop-token-ids", "1;2"], "'1;2' is not a token id"),
        (["generate", "hi", "--logit-bias", "5"], "'5' is not ID=VALUE"),
        (["chat", "hello"], "hello"),
        (["chat", "--logprobs", "1"], "--logprobs"),
        (["serv"], "serv"),
    ],
)
def test_a_wrong_command_line_is_argparse_error_2(
    argv: list[str], message: str, llm: FakeLLM, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    captured = capsys.readouterr()
    if exit_info.value.code != 2 or message not in captured.err or captured.out:
        pytest.fail(f"{exit_info.value.code}: {captured}")


@pytest.mark.badinput
@pytest.mark.parametrize(
    "argv,message",
    [
        (["generate", "hi", "--temperature", "-1"], "temperature=-1.0"),
        (["generate", "hi", "--temperature", "nan"], "temperature=nan"),
        (["generate", "hi", "--top-p", "0"], "top_p=0.0"),
        (["generate", "hi", "--max-tokens", "0"], "max_tokens=0"),
        (["generate", "hi", "--min-tokens", "200"], "max_tokens=128"),
        (["generate", "hi", "-n", "0"], "n=0"),
        (["chat", "--stop", ""], "stop="),
        (["generate", "hi", ""], "prompt 2 is empty"),
        (["generate", "-", "-"], "once only"),
        (["generate", "bad \udcff byte"], "prompt 1 is not UTF-8"),
        (["generate", "hi", "--raw", "--system", "s"], "--raw uses no chat template"),
        (["generate", "hi", "--raw", "--chat-template", "{{x}}"], "--raw uses no chat template"),
        (["generate", "hi", "--logprobs", "1"], "need --json"),
        (["generate", "hi", "--prompt-logprobs", "0"], "need --json"),
        (["chat", "--chat-template", "/no/such/file"], "/no/such/file"),
    ],
)
def test_values_are_refused_with_code_2_before_loading(
    argv: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate, "load_llm", refuse_loading)
    monkeypatch.setattr(chat, "load_llm", refuse_loading)
    monkeypatch.setattr(sys, "stdin", Stdin("text"))
    code = main(argv)
    captured = capsys.readouterr()
    if code != 2 or not captured.err.startswith("error: ") or message not in captured.err or captured.out:
        pytest.fail(f"{code}: {captured}")
    if "Traceback" in captured.err or f"folovllm {argv[0]} --help" not in captured.err:
        pytest.fail(captured.err)


def test_version_and_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--version"])
    assert exit_info.value.code == 0 and capsys.readouterr().out == f"folovllm {__version__}\n"
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "generate" in captured.err and "chat" in captured.err


@pytest.mark.badinput
def test_a_refused_prompt_is_reported_before_any_work(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["generate", "ok", "x" * 300])
    captured = capsys.readouterr()
    if code != 1 or captured.out or not captured.err.startswith("error: prompt 2 of 2: prompt has 317 tokens"):
        pytest.fail(f"{code}: {captured}")
    engine = llm.llm_engine
    if engine.num_steps or engine.aborted != ["generate-0"] or engine.has_unfinished_requests():
        pytest.fail("the first prompt was left in the engine")


@pytest.mark.badinput
@pytest.mark.parametrize("error", [ValueError("no such model"), OSError("no such model")])
def test_errors_of_loading_are_one_line(
    error: Exception, llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: Any) -> Any:
        raise error

    monkeypatch.setattr(generate, "load_llm", fail)
    code = main(["generate", "Hi"])
    if (code, capsys.readouterr()) != (1, ("", "error: no such model\n")):
        pytest.fail("not one line and code 1")
    monkeypatch.setenv("FOLOVLLM_DEBUG", "1")
    with pytest.raises(type(error), match="no such model"):
        main(["generate", "Hi"])


@pytest.mark.badinput
def test_model_defaults_that_contradict_a_flag(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, FakeLLM(temperature=0.0))
    code = main(["generate", "Hi", "-n", "2"])
    err = capsys.readouterr().err
    if code != 1 or "n=2 must be 1 with temperature=0" not in err:
        pytest.fail(f"{code}: {err}")


def test_our_own_mistakes_keep_their_traceback(llm: FakeLLM) -> None:
    def lose(step: int) -> None:
        llm.llm_engine.requests.clear()

    llm.llm_engine.on_step = lose
    with pytest.raises(RuntimeError, match="lost these requests: generate-0"):
        main(["generate", "Hi"])


def test_ctrl_c_aborts_between_steps(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    llm.llm_engine.on_step = lambda step: signal.raise_signal(signal.SIGINT) if step == 2 else None
    assert main(["generate", "Hi", "Ho"]) == 130
    captured = capsys.readouterr()
    assert captured.out == "--- prompt 1 of 2: Hi\nHello\n", "the step that was interrupted is not lost"
    assert captured.err == "interrupted\n"
    assert llm.llm_engine.num_steps == 2 and llm.llm_engine.aborted == ["generate-0", "generate-1"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_ends_a_step_that_hangs(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    def hang(step: int) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("still there")

    llm.llm_engine.on_step = hang
    assert main(["generate", "Hi", "--json"]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")
    assert llm.llm_engine.aborted == [], "an engine in the middle of a step is not asked for anything"


def test_ctrl_c_in_the_last_step_loses_nothing(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.llm_engine.on_step = lambda step: signal.raise_signal(signal.SIGINT) if step == 4 else None
    assert main(["generate", "-q", "Hi"]) == 0
    assert capsys.readouterr().out == "Hello world\n"


def test_deferred_interrupt_outside_the_main_thread() -> None:
    results = []

    def work() -> None:
        with streaming.deferred_interrupt() as interrupted:
            results.append(interrupted())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert results == [False]


def test_a_reader_that_went_away_ends_quietly(
    llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Gone(Terminal):
        def write(self, text: str) -> int:
            if self.writes:
                raise BrokenPipeError
            return super().write(text)

    monkeypatch.setattr(sys, "stdout", Gone())
    assert main(["generate", "Hi"]) == 141
    assert capsys.readouterr().err == ""
    assert llm.llm_engine.num_steps == 2 and llm.llm_engine.aborted == ["generate-0"]


def test_closing_the_iterator_aborts() -> None:
    engine = FakeEngine()
    params = SamplingParams(output_kind=RequestOutputKind.DELTA)
    steps: Any = streaming.stream_answers(engine, ["a", "b"], params, 0.0, lambda: False, "x")  # type: ignore[arg-type]
    next(steps)
    steps.close()
    assert engine.aborted == ["x-0", "x-1"] and not engine.has_unfinished_requests()


def test_answer_times_with_several_tokens_a_step() -> None:
    answer = streaming.Answer(0, 0, start_s=10.0)
    assert (answer.ttft_s, answer.total_s, answer.tokens_per_s) == (None, None, None)

    def add(text: str, token_ids: list[int], now_s: float, finish: str | None = None) -> None:
        delta = CompletionOutput(0, text, token_ids, finish_reason=finish)
        answer.add(RequestOutput("r", None, [1, 2], None, [delta], finish is not None), delta, now_s)

    add("", [], 10.5)  # nothing but news: not the first token
    add("", [1, 2], 11.0)  # text held back: the tokens are there all the same
    add("abc", [3, 4, 5], 12.0)
    add("d", [], 14.0, "stop")  # text flushed at the end: no token came then
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("abcd", [1, 2, 3, 4, 5], "stop")
    assert (answer.ttft_s, answer.total_s, answer.tokens_per_s) == (1.0, 2.0, 3.0)
    assert streaming.closing_line(answer, 5) == "[2 prompt tokens, 5 output tokens, TTFT 1.000 s, 3.0 tokens/s]"


HEAVY = ("torch", "transformers", "numpy", "rich", "tqdm", "huggingface_hub", "jinja2", "safetensors", "gguf")


def run_python(*argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *argv],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **env},
        check=False,
    )


@pytest.mark.parametrize("argv", [["--help"], ["generate", "--help"], ["chat", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from folovllm.entrypoints.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print(time.perf_counter() - start, *sys.modules, file=sys.stderr)"
    )
    done = run_python("-c", code, *argv)
    assert done.returncode == 0 and done.stdout
    seconds, *modules = done.stderr.split()
    print(f"folovllm {' '.join(argv)}: {float(seconds):.3f} s after the start of Python")
    assert not set(HEAVY) & set(modules)


def test_python_dash_m_is_the_command() -> None:
    done = run_python("-m", "folovllm", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"folovllm {__version__}\n", "")
    done = run_python("-m", "folovllm", "generate", "Hi", "--top-p", "2", FOLOVLLM_DEBUG="0")
    assert done.returncode == 2 and done.stderr.startswith("error: top_p=2.0") and done.stdout == ""


def test_a_closed_pipe_leaves_no_message() -> None:
    """The whole process: output into a pipe that nobody reads any more."""
    code = (
        "import sys; from folovllm.entrypoints.cli import generate, main\n"
        "def lines(args):\n    print('x' * 100); return 0\n"
        "generate.run = lines\n"
        "sys.exit(main.main(['generate', 'Hi']))"
    )
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as pipe:
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdout=pipe,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
            # Buffered, so that the output meets the closed pipe as late as it can.
            env={**os.environ, "PYTHONUNBUFFERED": ""},
        )
    assert (done.returncode, done.stderr) == (141, "")
