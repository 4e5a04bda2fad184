"""docs/serving.md says what is so: every flag with its default, every metric, every field of a request."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from folovllm.entrypoints.openai import protocol
from folovllm.entrypoints.openai.settings import ServerSettings
from folovllm.metrics.prometheus import PREFIX, PrometheusStatLogger

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
DOCKERFILES = sorted((ROOT / "examples" / "docker").glob("Dockerfile.*"))


def section(title: str) -> str:
    """The text below a heading, up to the next one of its level."""
    level = re.search(rf"^(#+) {re.escape(title)}$", TEXT, flags=re.MULTILINE)
    assert level is not None, title
    return re.split(rf"^#{{1,{len(level[1])}}} ", TEXT[level.end() :], flags=re.MULTILINE)[0]


def rows(text: str) -> list[list[str]]:
    """The cells of every table row of `text`, headings and rules left out."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not set(line) <= set("|- ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def parser() -> argparse.ArgumentParser:
    return ServerSettings.add_cli_args(argparse.ArgumentParser(add_help=False))


def test_flags() -> None:
    documented = {flag: row[1] for row in rows(section("Flags")) for flag in re.findall(r"`(--[a-z-]+)`", row[0])}
    actions = {action.option_strings[0]: action for action in parser()._actions}
    assert documented.keys() == actions.keys()
    for flag, default in documented.items():
        expected = actions[flag].default
        if default.startswith("`") and " " not in default:
            assert str(expected) == default.strip("`"), flag
        else:
            assert expected in (None, False, []), flag


def test_metrics() -> None:
    documented = {name: row[1] for row in rows(section("Metrics"))[1:] for name in re.findall(r"`(\w+)`", row[0])}
    metrics = {
        family.name.removeprefix(PREFIX): family.type
        for family in PrometheusStatLogger("m").registry.collect()
        if family.name.startswith(PREFIX)
    }
    assert documented == metrics


def test_fields() -> None:
    """Each field that changes something is named; a sentence covers those with one allowed value."""
    text = section("What a request may say")
    named = {name for code in re.findall(r"`([^`]+)`", text) for name in re.split(r"[.,\s]+", code)}
    for model in (protocol.CompletionRequest, protocol.ChatCompletionRequest):
        for name, field in model.model_fields.items():
            changes_nothing = field.description in (protocol.NotSupported, protocol.Label) or (
                field.description or ""
            ).startswith("A hint that changes nothing")
            assert changes_nothing or name in named, name


def test_fields_exist() -> None:
    fields = [item for model in vars(protocol).values() for item in getattr(model, "model_fields", {}).items()]
    known = {name for name, _ in fields} | {field.alias for _, field in fields}
    table = [row for row in rows(section("What a request may say")) if row[0].startswith("`")]
    documented = {name for row in table for code in re.findall(r"`([^`]+)`", row[0]) for name in code.split(".")}
    assert documented and documented <= known, documented - known


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles(path: Path) -> None:
    """They cannot be built here; what they name exists."""
    text = path.read_text(encoding="utf-8")
    flags = set(re.findall(r'"(--[a-z-]+)"', text))
    assert flags and flags <= {action.option_strings[0] for action in parser()._actions}
    for line in re.findall(r"^COPY (.*) \S+$", text, flags=re.MULTILINE):
        assert all((ROOT / source).exists() for source in line.split())
    pin = re.search(r"torch==([\d.]+)", text)
    assert pin is not None and f"torch=={pin[1]}" in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    extras = re.search(r'"\.\[([a-z,]+)\]"', text)
    assert extras is not None
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(re.search(rf"^{extra} = \[", project, flags=re.MULTILINE) for extra in extras[1].split(","))


def test_flags_of_the_examples() -> None:
    """Commands in the document, and in the systemd unit, have only flags that exist."""
    from folovllm.benchmarks import serve
    from folovllm.engine.arg_utils import EngineArgs

    known = {"--help"}
    bench = argparse.ArgumentParser(add_help=False)
    serve.add_args(bench)
    for each in (parser(), bench, EngineArgs.add_cli_args(argparse.ArgumentParser(add_help=False))):
        known |= {option for action in each._actions for option in action.option_strings}
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT)) - {"--"}
    assert used and used <= known, used - known
