"""Errors a user can meet. Each message says what came, what was expected and what to do."""

from __future__ import annotations


class PowerRetentionError(Exception):
    """Base of every error this package raises on purpose; the command line prints it as one sentence."""


class ArgumentError(PowerRetentionError, ValueError):
    """A wrong shape, dtype, power, gate or option in a call."""


class StateError(PowerRetentionError, ValueError):
    """A state that does not fit the operator or model it is given to, or a damaged state file."""


class SourceError(PowerRetentionError, ValueError):
    """A model source that is missing, damaged or of a kind that cannot be converted."""


class DataError(PowerRetentionError, ValueError):
    """A text file that is missing, empty, not UTF-8 or too short."""


class OutputError(PowerRetentionError, OSError):
    """An output that cannot be written: it exists already, or the disk is full."""


class CheckpointError(PowerRetentionError, ValueError):
    """A training checkpoint that is damaged or belongs to another run."""


class BackendError(PowerRetentionError, RuntimeError):
    """No backend can run a call, or the one asked for cannot."""


class RunInterrupted(PowerRetentionError):
    """A run was asked to stop; its state is saved."""
