"""Structured output: a request's text follows a JSON schema, a regex, a list of choices or a grammar.

    front    Processor         is the specification one that we can hold to?        backend_xgrammar.validate
    core     Scheduler         the request waits while its grammar is compiled      manager, compile_pool
             EngineCore.step   which tokens may come next, a bit per token          manager.make_bitmask
    worker   Sampler           every other token's logit becomes -inf               sample/ops/grammar_mask.py
    core     Scheduler         the drawn token moves the grammar on                 XgrammarGrammar.accept_token

What a grammar is, and how it says which tokens may come next, is xgrammar's work. Ours is what it would get wrong
without a word: keywords of JSON Schema and parts of regexes that it ignores are refused by name (`json_schema`,
`regex`). vLLM: `v1/structured_output/`. Importing this package imports neither xgrammar nor torch.
"""
