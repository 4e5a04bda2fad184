"""folovllm/sample."""
