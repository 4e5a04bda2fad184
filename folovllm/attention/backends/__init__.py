"""folovllm/attention/backends."""
