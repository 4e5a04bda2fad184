"""The core is plain Python: it imports and schedules where torch cannot be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
for name in ("torch", "transformers", "triton"):
    sys.modules[name] = None  # importing it raises ImportError

from tests.core_utils import FakeEngine, create_requests, create_scheduler, expected_tokens

for use_async in (False, True):
    scheduler = create_scheduler(
        num_blocks=12, block_size=4, use_async=use_async, enable_prefix_caching=True,
        max_num_batched_tokens=16, max_num_seqs=8, policy="priority", log_stats=True,
    )
    engine = FakeEngine(scheduler, depth=int(use_async))
    requests = create_requests(6, 10, block_size=4, ignore_eos=True)
    engine.add(*requests)
    engine.run()
    for request in requests:
        assert engine.outputs[request.request_id] == expected_tokens(request, 8192)
    assert sum(request.num_preemptions for request in requests) > 0
loaded = [name for name, module in sys.modules.items() if name.split(".")[0] in ("torch", "numpy") and module]
print("done", loaded)
"""


def test_scheduler_runs_with_torch_blocked() -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "done []"
