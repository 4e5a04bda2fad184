"""The torch-free core: scheduler and KV cache bookkeeping (vLLM: `v1/core/`)."""
