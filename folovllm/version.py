"""The version, in the one place that the package, the build and the command line read it from."""

from __future__ import annotations

__version__ = "0.1.0"
"""Version of FoloVLLM, as `major.minor.patch`."""
