"""The fast backend: Triton kernels for any GPU that Triton knows, with settings measured per GPU family or on this machine.

Reading order: ``backend`` (which call takes which kernels), ``plan`` (chunks, tiles), ``prepare``, ``states``, ``forward``,
``backward``; then ``tuned`` (where settings come from), ``sizes`` (form, chunk, memory), ``tuning`` (the verified sweep) and
``samples`` (the calls it runs).  Nothing here imports Triton until a call needs it.
"""

from __future__ import annotations

from importlib.util import find_spec

from power_retention.ops.backends import register_backend
from power_retention.ops.triton.backend import TritonBackend


def register() -> None:
    """Put the Triton backend first, where Triton is installed."""
    if find_spec("triton") is not None:
        register_backend(TritonBackend())
