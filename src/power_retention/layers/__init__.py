"""Layers: the mixer that stands where attention stood."""

from power_retention.layers.mixer import PowerRetentionMixer

__all__ = ["PowerRetentionMixer"]
