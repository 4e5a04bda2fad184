"""The ways in: the Python class `LLM` (llm.py) and the command `folovllm` (cli/).

Importing this package imports neither torch nor any other heavy library.
"""
