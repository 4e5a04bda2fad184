"""folovllm/attention."""
