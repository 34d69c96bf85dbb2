"""A plugin for vLLM: with it installed, ``vllm serve DIR`` serves our models; see ``docs/serving.md``."""
