"""The HTTP server: OpenAI's endpoints over an EngineClient (vLLM: `entrypoints/openai`). Needs the extra `server`.

api_server.py has the routes; serving_*.py what they do; protocol.py what a request may say.
"""
