"""folovllm/executor."""
