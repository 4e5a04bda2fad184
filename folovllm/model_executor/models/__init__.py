"""folovllm/model_executor/models."""
