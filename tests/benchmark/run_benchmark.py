"""The ladder, M1 to M7: `folovllm bench ladder` under the name that the design gives it. Flags: --help.

python tests/benchmark/run_benchmark.py --quick
"""

from __future__ import annotations

import sys

from folovllm.entrypoints.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["bench", "ladder", *sys.argv[1:]]))
