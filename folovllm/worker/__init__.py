"""folovllm/worker."""
