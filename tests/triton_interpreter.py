"""Triton's interpreter, which runs kernels where there is no GPU, on NumPy >= 2.4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def index_scalars(set_attribute: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let the interpreter count loops: NumPy no longer turns arrays of one number into integers.

    `set_attribute` may be a monkeypatch's, which takes it back.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    set_attribute(interpreter, "_patch_lang_tensor", patch_and_index)
