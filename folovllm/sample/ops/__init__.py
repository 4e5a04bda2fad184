"""folovllm/sample/ops."""
