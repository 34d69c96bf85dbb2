"""Which model a state belongs to, told in milliseconds."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

_SAMPLES = 64


@torch.no_grad()
def fingerprint_model(model: nn.Module) -> str:
    """``"weights-sample:…"``: a SHA-256 over the name, the shape and 64 evenly spaced entries of every parameter.

    Entries are rounded to bfloat16 first, so that a model loaded in another precision is still itself.  It tells models apart;
    it is no proof against somebody who means to deceive.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.named_parameters()):
        digest.update(f"{name} {list(value.shape)}".encode())
        flat = value.detach().reshape(-1)
        sample = flat[torch.linspace(0, flat.numel() - 1, min(_SAMPLES, flat.numel()), dtype=torch.float64).long()]
        digest.update(sample.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return f"weights-sample:{digest.hexdigest()[:32]}"
