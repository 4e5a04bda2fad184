"""folovllm/model_executor/layers."""
