"""Where a model comes from and how its tensors reach the parameters (vLLM: `model_executor/model_loader/`).

`source.py` turns the `model` string into a `ModelSource`; `loader.py` streams its tensors into the model.
Importing this package imports neither torch nor transformers.
"""
