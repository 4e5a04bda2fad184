"""Whole-process times of `import folovllm` and `folovllm --help`, median of several fresh processes.

python tests/benchmark/import_time.py [--runs 9]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import folovllm": ["-c", "import folovllm"],
    "folovllm --help": ["-m", "folovllm", "--help"],
    "folovllm generate --help": ["-m", "folovllm", "generate", "--help"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args()
    for name, command in COMMANDS.items():
        seconds = []
        for _ in range(args.runs + 1):
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - start)
        # The first run reads files from disk; the others are what a user who works with it sees.
        warm = statistics.median(seconds[1:])
        print(f"{name:28} median {warm * 1e3:6.0f} ms   first {seconds[0] * 1e3:6.0f} ms   bound: 300 / 500 ms")


if __name__ == "__main__":
    main()
