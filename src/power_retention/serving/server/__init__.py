"""A small OpenAI-compatible server on our own Hugging Face classes: for a laptop, or wherever vLLM is not."""
