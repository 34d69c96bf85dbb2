"""The file that states travel in: safetensors, with a JSON header in its metadata.

A state is a context that has been read once; a file of it may be loaded by another process, machine or version.  So the
header says which layout, power, widths and model it belongs to, a checksum covers header and tensors, and a file is
either complete or absent: it is written beside its destination and moved there when it is safe on disk.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from power_retention.errors import ArgumentError, OutputError, StateError
from power_retention.files import replacement
from power_retention.ops.layout import LAYOUT, blocks16_width, from_blocks16
from power_retention.ops.state import PowerState

FORMAT = "power-retention-state"
VERSION = 1

BLOCKS16_LAYOUT = "retention/blocks16"
"""States of the public `retention` package (p = 2); converted when loaded."""

_METADATA_KEY = "power-retention"
_DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_LONGEST_HEADER = 1 << 26


@dataclass(frozen=True)
class StateHeader:
    """What a state file says about itself.

    Attributes:
        format: ``"power-retention-state"``.
        version: of the file format.
        layout: of the states, see :mod:`power_retention.ops.layout`.
        p: the power.
        head_width: key width d.
        value_width: value width e.
        heads: key/value heads H.
        batch: sequences B.
        layers: states in the file.
        model: fingerprint of the model that the states belong to, "" if none was given.
        tokens_seen: tokens that the states have read.
        created: when, in UTC, ISO 8601.
        extra: anything else, text to text.
        checksum: ``"sha256:…"`` over the other fields and the tensors.
    """

    format: str
    version: int
    layout: str
    p: int
    head_width: int
    value_width: int
    heads: int
    batch: int
    layers: int
    model: str
    tokens_seen: int
    created: str
    extra: dict[str, str] = field(default_factory=dict)
    checksum: str = ""


def save_states(
    path: str | os.PathLike[str],
    states: Sequence[PowerState],
    *,
    model: str = "",
    tokens_seen: int = 0,
    extra: Mapping[str, str] | None = None,
) -> StateHeader:
    """Write one state a layer, replacing ``path`` only once the new file is complete.

    Args:
        path: destination; its folder must exist.
        states: of layers with equal p, widths, heads and batch; dtypes are kept.
        model: fingerprint of the model that made them.
        tokens_seen: tokens read.
        extra: more text for the header.

    Returns:
        The header written.

    Raises:
        StateError: the states do not belong in one file.
        OutputError: the file cannot be written; an earlier file at ``path`` is unchanged.
    """
    if not all(isinstance(text, str) for item in (extra or {}).items() for text in item):
        raise ArgumentError(f"extra must map text to text, not {extra!r}.")
    batch, heads, head_width, value_width, p = _common_shape(states)
    header = StateHeader(
        format=FORMAT,
        version=VERSION,
        layout=LAYOUT,
        p=p,
        head_width=head_width,
        value_width=value_width,
        heads=heads,
        batch=batch,
        layers=len(states),
        model=model,
        tokens_seen=tokens_seen,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        extra=dict(extra or {}),
    )
    return write_state_file(path, header, states)


def write_state_file(
    path: str | os.PathLike[str], header: StateHeader, states: Sequence[tuple[Tensor, Tensor, *tuple[Any, ...]]]
) -> StateHeader:
    """Write (memory, normalizer) pairs, one a layer, under a given header; returns it with its checksum."""
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for layer, state in enumerate(states)
        for name, tensor in zip(_names(layer), state[:2], strict=True)
    }
    header = dataclasses.replace(header, checksum=_checksum(header, tensors))
    _write_atomically(Path(path), _safetensors_parts(header, tensors))
    return header


def read_header(path: str | os.PathLike[str]) -> StateHeader:
    """The header of a state file, without reading its tensors.

    Raises:
        StateError: ``path`` is missing, cut short, or not a state file that this version reads.
    """
    path = Path(path)
    metadata = _safetensors_metadata(path)
    try:
        fields = json.loads(metadata[_METADATA_KEY])
    except (KeyError, TypeError, ValueError):
        raise StateError(f"{path} is not a state file: it carries no {FORMAT!r} header.") from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise StateError(f"{path} is not a state file: its header does not say {FORMAT!r}.")
    if fields.get("version") != VERSION:
        raise StateError(
            f"{path} is a state file of version {fields.get('version')!r}; this package reads version {VERSION}. "
            "Load it with the version that wrote it."
        )
    return _header_from(fields, path)


def load_states(
    path: str | os.PathLike[str],
    *,
    model: str | None = None,
    device: torch.device | str = "cpu",
    verify: bool = True,
) -> tuple[list[PowerState], StateHeader]:
    """Read the states of a file.

    Args:
        path: of a file that :func:`save_states` wrote.
        model: fingerprint that the file must carry; None accepts any.
        device: where the states go.
        verify: check the checksum, which reads every byte once more.

    Returns:
        One state a layer, in the canonical layout and in the dtypes saved, and the header of the file.

    Raises:
        StateError: the file is missing, cut short, altered, in an unknown layout, of another model or no state file.
    """
    path = Path(path)
    header = read_header(path)
    if header.layout not in (LAYOUT, BLOCKS16_LAYOUT):
        raise StateError(
            f"{path} holds states in the layout {header.layout!r}; this package reads {LAYOUT!r} and "
            f"{BLOCKS16_LAYOUT!r}."
        )
    if model is not None and header.model != model:
        raise StateError(
            f"{path} belongs to the model {header.model!r}, not to {model!r}: a state only means something to "
            "the model that made it. Load it into that model, or read the context again."
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise StateError(f"{path} is damaged and cannot be read ({error}).") from None
    if verify and _checksum(header, tensors) != header.checksum:
        raise StateError(f"{path} was altered after it was written: its checksum does not match. Use another copy.")
    pairs = [_layer_tensors(path, header, tensors, layer) for layer in range(header.layers)]
    return [_to_state(header, *pair, device) for pair in pairs], header


def fork_states(path: str | os.PathLike[str], copy: str | os.PathLike[str]) -> StateHeader:
    """Copy a state file, checked, into a new one that notes the original's checksum as ``forked_from``.

    Raises:
        StateError: ``path`` is missing, damaged or no state file.
        OutputError: ``copy`` exists, or cannot be written.
    """
    if Path(copy).exists():
        raise OutputError(f"{copy} exists already; choose another name, or remove it first.")
    states, header = load_states(path)
    extra = header.extra | {"forked_from": header.checksum}
    return save_states(copy, states, model=header.model, tokens_seen=header.tokens_seen, extra=extra)


def _common_shape(states: Sequence[PowerState]) -> tuple[int, int, int, int, int]:
    """(B, H, d, e, p) that all states share."""
    if not states:
        raise StateError("There is no state to save; one state a layer was expected.")
    shapes = set()
    for layer, state in enumerate(states):
        if not isinstance(state, PowerState) or state.memory.ndim != 4 or state.normalizer.ndim != 3:
            raise StateError(f"Layer {layer} holds no PowerState of [B, H, D, e] and [B, H, D] tensors.")
        for tensor in state[:2]:
            if tensor.dtype not in _DTYPE_NAMES:
                raise StateError(f"Layer {layer} holds a state in {tensor.dtype}; a floating dtype was expected.")
        width = math.comb(state.head_width + state.p - 1, state.p)
        if state.memory.shape[2] != width or state.normalizer.shape != state.memory.shape[:3]:
            raise StateError(
                f"Layer {layer} holds tensors {list(state.memory.shape)} and {list(state.normalizer.shape)}; "
                f"p={state.p} and head width {state.head_width} make [B, H, {width}, e] and [B, H, {width}]."
            )
        batch, heads, _, value_width = state.memory.shape
        shapes.add((batch, heads, state.head_width, value_width, state.p))
    if len(shapes) > 1:
        raise StateError(
            f"The layers differ in (batch, heads, head width, value width, p): {sorted(shapes)}. One file holds equal "
            "ones; save the others to files of their own."
        )
    return shapes.pop()


def _names(layer: int) -> tuple[str, str]:
    return f"layers.{layer}.memory", f"layers.{layer}.normalizer"


def _checksum(header: StateHeader, tensors: Mapping[str, Tensor]) -> str:
    fields = dataclasses.asdict(header) | {"checksum": ""}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(_bytes_of(tensors[name]))
    return f"sha256:{digest.hexdigest()}"


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _safetensors_parts(header: StateHeader, tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The file in pieces: no second copy of the states is made on the way to disk."""
    entries: dict[str, Any] = {"__metadata__": {_METADATA_KEY: json.dumps(dataclasses.asdict(header))}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    yield from map(_bytes_of, tensors.values())


def _write_atomically(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    try:
        with replacement(path) as temporary, open(temporary, "xb") as file:
            file.writelines(parts)
    except OSError as error:
        remedy = "Free some space or choose another folder"
        if not path.parent.is_dir():
            remedy = f"The folder {path.parent} does not exist: create it"
        raise OutputError(
            f"The state cannot be written to {path}: {error.strerror or error}. {remedy}; whatever was there before is "
            "unchanged."
        ) from error


def _safetensors_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, which must be as long as it says."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > _LONGEST_HEADER:
                raise StateError(f"{path} is not a state file: it does not start like one.")
            if size < 8 + length:
                raise StateError(f"{path} is cut short within its header, or not a state file. Use another copy.")
            entries = json.loads(file.read(length))
            metadata = dict(entries.pop("__metadata__", {}))
            expected = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error.strerror or error}.") from None
    except (ValueError, AttributeError, TypeError, KeyError, IndexError) as error:
        if isinstance(error, StateError):
            raise
        raise StateError(f"{path} is not a state file: it has no safetensors header.") from None
    if size != expected:
        raise StateError(
            f"{path} is damaged: it has {size:,} bytes where its header announces {expected:,}, so its copy was "
            "cut short or overwritten. Use another copy."
        )
    return metadata


def _header_from(fields: dict[str, Any], path: Path) -> StateHeader:
    types = {"str": str, "int": int, "dict[str, str]": dict}
    for item in dataclasses.fields(StateHeader):
        if type(fields.get(item.name)) is not types[str(item.type)]:
            raise StateError(f"{path} is damaged: the field {item.name!r} of its header is {fields.get(item.name)!r}.")
    try:
        return StateHeader(**fields)
    except TypeError:
        raise StateError(f"{path} is damaged: its header has fields that version {VERSION} does not know.") from None


def _layer_tensors(path: Path, header: StateHeader, tensors: Mapping[str, Tensor], layer: int) -> tuple[Tensor, Tensor]:
    blocks = header.layout == BLOCKS16_LAYOUT
    width = blocks16_width(header.head_width) if blocks else math.comb(header.head_width + header.p - 1, header.p)
    expected = (header.batch, header.heads, width, header.value_width)
    found = []
    for name, shape in zip(_names(layer), (expected, expected[:3]), strict=True):
        tensor = tensors.get(name)
        if tensor is None or tuple(tensor.shape) != shape:
            got = "missing" if tensor is None else list(tensor.shape)
            raise StateError(f"{path} is damaged: {name} should be {list(shape)} and is {got}.")
        found.append(tensor)
    return found[0], found[1]


def _to_state(header: StateHeader, memory: Tensor, normalizer: Tensor, device: torch.device | str) -> PowerState:
    # Copied, since tensors that were read are maps of the file and would change with it.
    memory, normalizer = memory.to(device, copy=True), normalizer.to(device, copy=True)
    if header.layout == BLOCKS16_LAYOUT:
        memory, normalizer = (from_blocks16(x, header.head_width, 2) for x in (memory, normalizer))
    return PowerState(memory, normalizer, header.p, header.head_width)
