"""The command `folovllm`: main.py finds the subcommand, generate.py and chat.py are the subcommands."""
