"""Small helpers that know nothing of the engine."""

from folovllm.utils.common import get_hash_fn_by_name, sha256

__all__ = ["get_hash_fn_by_name", "sha256"]
