"""Serving: text from a model."""
