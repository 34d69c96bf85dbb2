"""Evaluation: held-out loss against the teacher, and what decoding costs."""
