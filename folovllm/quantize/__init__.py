"""Making quantized checkpoints, and measuring what they lose.

`spec.py` says what is wanted, `gptq.py` quantizes one matrix, `calibration.py` finds the token ids that it is tuned on,
`layer.py` runs one decoder layer in stages, `pipeline.py` goes through the model layer by layer, `checkpoint.py` writes
the folder, `perplexity.py` measures. vLLM has no counterpart (llm-compressor and GPTQModel are separate projects).
Importing this package imports no torch.
"""
