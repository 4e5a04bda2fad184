"""The API reference: every module of the package as HTML, made by pdoc from the docstrings.

python tools/make_docs.py OUTPUT_FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import pdoc

import folovllm

PACKAGE = Path(folovllm.__file__).parent


def module_names() -> list[str]:
    """Return the dotted names of all modules of the package, `__main__` apart (importing it runs it)."""
    names = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        if parts[-1] != "__main__":
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def main() -> None:
    """Write the pages."""
    # The package's public names load on first use; pdoc looks only at what is there.
    for name in folovllm.__all__:
        setattr(folovllm, name, getattr(folovllm, name))
    pdoc.pdoc(*module_names(), output_directory=Path(sys.argv[1]))


if __name__ == "__main__":
    main()
