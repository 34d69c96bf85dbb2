"""A plugin for vLLM: ``pip install power-retention[vllm]``, then ``vllm serve DIR`` serves our models; see ``docs/serving.md``."""
