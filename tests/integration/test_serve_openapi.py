"""schemathesis asks whatever /openapi.json allows, and what it does not: the server answers all of it, and lives on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("schemathesis")

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from tests.serve_utils import TIMEOUT_S, completion, is_idle, save_tiny_chat_model, start_tiny_server, wait_for

BOUNDS = ["--max-n", "2", "--max-output-tokens", "4", "--max-prompts", "4", "--max-queued-requests", "64", "--dev-mode"]
"""So that a request that is right is also short."""
EXAMPLES = {"/v1/chat/completions": 240, "/v1/completions": 240, "/tokenize": 80, "/detokenize": 60}
"""Cases per operation, of each kind; 20 for the others."""


def ask(operation: Any, mode: GenerationMode, statuses: Counter[tuple[str, str, int]]) -> None:
    """Send generated cases of one operation, and look at every answer."""
    documented = {int(status) for status in operation.definition.raw["responses"]}
    options = settings(
        max_examples=EXAMPLES.get(operation.path, 20),
        phases=[Phase.generate],
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )

    @options
    @given(operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        response = case.call(timeout=TIMEOUT_S)
        status = response.status_code
        statuses[operation.method.upper(), operation.path, status] += 1
        assert status < 500, f"{case.as_curl_command()}\n{status} {response.content!r}"
        assert status in documented | {404, 405}, f"{case.as_curl_command()}\n{status} {response.content!r}"
        if status >= 400:
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"} and error["message"], error

    run()


@pytest.mark.slow
def test_generated_requests(tmp_path: Path) -> None:
    model = save_tiny_chat_model(tmp_path)
    statuses: Counter[tuple[str, str, int]] = Counter()
    with start_tiny_server(model, *BOUNDS) as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        operations = [result.ok() for result in schema.get_all_operations()]
        assert {operation.path for operation in operations} >= {*EXAMPLES, "/v1/models", "/health", "/metrics"}
        for operation in operations:
            ask(operation, GenerationMode.POSITIVE, statuses)
            if operation.body:
                ask(operation, GenerationMode.NEGATIVE, statuses)
        print(*sorted(statuses.items()), sep="\n")
        assert sum(statuses.values()) >= 1000
        # Both kinds of answers came: neither everything refused nor everything taken.
        for path in EXAMPLES:
            assert {200, 400} <= {status for _, asked, status in statuses if asked == path}, path
        wait_for(lambda: is_idle(server.url), "an idle server")
        assert httpx.get(f"{server.url}/health", timeout=TIMEOUT_S).status_code == 200
        assert completion(server, prompt="x", max_tokens=2, ignore_eos=True)["usage"]["completion_tokens"] == 2
        assert server.stop() == 0
        assert "Traceback" not in server.log(), server.log()[-4000:]
