"""The scheduler: what each step of the engine computes (vLLM: `v1/core/sched/`)."""
