"""Layers: the mixer that stands where attention stood, and the pieces that its sequences come in."""

from power_retention.layers.mixer import PowerRetentionMixer
from power_retention.layers.pieces import Piece
from power_retention.layers.scan import ContextParallel

__all__ = ["ContextParallel", "Piece", "PowerRetentionMixer"]
