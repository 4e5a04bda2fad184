"""folovllm/model_executor."""
