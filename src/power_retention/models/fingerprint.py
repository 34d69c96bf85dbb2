"""Which model a state belongs to, told in milliseconds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from power_retention.errors import SourceError

_SAMPLES = 64
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@torch.no_grad()
def fingerprint_model(model: nn.Module) -> str:
    """``"weights-sample:…"``: a SHA-256 over the name, the shape and 64 evenly spaced entries of every parameter.

    Entries are rounded to bfloat16 first, so that a model loaded in another precision is still itself.  It tells models apart;
    it is no proof against somebody who means to deceive.
    """
    return _fingerprint(
        (name, value.shape, value.detach().reshape(-1)[_sampled(value.numel())])
        for name, value in sorted(model.named_parameters())
    )


def fingerprint_folder(folder: Path) -> str:
    """The fingerprint of the model that a folder holds, of which only the sampled entries are read.

    Of models without experts, whose files name weights as the model does.

    Raises:
        SourceError: the folder holds no safetensors files, or experts.
    """
    try:
        tied = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("tie_word_embeddings", False)
        places = {
            name: (file, *place) for file in folder.glob("model*.safetensors") for name, place in _weights_in(file)
        }
    except (OSError, ValueError) as error:
        raise SourceError(f"{folder} holds no model that can be read: {error}") from error
    if not places or any(".experts." in name for name in places):
        kind = "a model with experts, which its files name otherwise" if places else "no model.safetensors"
        raise SourceError(f"{folder} holds {kind}; a dense model saved by save_pretrained was expected.")
    if tied:
        places.pop("lm_head.weight", None)
    return _fingerprint((name, place[2], _sample_of_file(*place)) for name, place in sorted(places.items()))


def _weights_in(file: Path) -> Iterable[tuple[str, tuple[torch.dtype, list[int], int]]]:
    """(name, (dtype, shape, offset in the file)) of each tensor of a safetensors file."""
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        entries = json.loads(opened.read(length))
    for name, entry in entries.items():
        if name != "__metadata__" and entry["dtype"] in _DTYPES:
            yield name, (_DTYPES[entry["dtype"]], entry["shape"], 8 + length + entry["data_offsets"][0])


def _sample_of_file(file: Path, dtype: torch.dtype, shape: list[int], offset: int) -> Tensor:
    size = dtype.itemsize
    wanted = _sampled(int(np.prod(shape))).numpy()[:, None] * size + np.arange(size) + offset
    return torch.from_numpy(np.memmap(file, np.uint8, "r")[wanted]).reshape(-1).view(dtype)


def _sampled(entries: int) -> Tensor:
    return torch.linspace(0, entries - 1, min(_SAMPLES, entries), dtype=torch.float64).long()


def _fingerprint(weights: Iterable[tuple[str, Sequence[int], Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, shape, sample in weights:
        digest.update(f"{name} {list(shape)}".encode())
        digest.update(sample.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return f"weights-sample:{digest.hexdigest()[:32]}"
