"""Conversion: from a pretrained Transformer to a power-retention model."""
