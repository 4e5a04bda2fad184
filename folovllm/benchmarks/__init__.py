"""Measuring the engine: `folovllm bench ladder | throughput | latency | serve` (vLLM: `benchmarks/`).

workload.py     what is asked of an engine
runner.py       asks it, and writes down what happened and when
schema.py       the records, and the one kind of file that every command writes
metrics.py      figures, from the records alone
machine.py      what the machine can do at best
rungs.py        the milestones as configurations
ladder.py       runs them in turn, each in a process of its own (child.py)
peers.py        other engines on the same workload
checkpoints.py  the model in the forms that M7 and other engines need
report.py, plots.py        tables and pictures
throughput.py, latency.py  one engine, one question (session.py: what they share)
"""
