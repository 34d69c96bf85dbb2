"""Settings that were measured: those shipped for each GPU family, and those a user's own machine found.

Nothing here is keyed on a sequence's length.  A setting belongs to a kernel and a :class:`ShapeClass`; a user's own also to
the GPU's name, the kernel's source and the version of Triton, so an upgrade that leaves a kernel alone leaves its setting
alone.  Files are read when a kernel first needs them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from power_retention.files import clear_write_errors, write_json
from power_retention.ops.cost import Costs

Setting = Mapping[str, int]

KERNEL_FILES = {
    "block": ("states", "forward", "backward"),
    "accumulate": ("states",),
    "read": ("forward",),
    "attend": ("forward",),
    "contract": ("backward",),
    "query_grad": ("backward",),
    "key_grad": ("backward",),
    "value_grad": ("backward",),
    "costs": ("prepare", "states", "forward", "backward", "backend"),
}
"""The files of this folder that each setting belongs to; ``common`` belongs to all of them."""

_FOLDER = Path(__file__).parent
_FAMILIES = {8: "ampere", 9: "hopper", 10: "blackwell", 12: "blackwell"}


@dataclass(frozen=True)
class ShapeClass:
    """What a setting may depend on.

    Attributes:
        width: the larger of the two head widths, as the kernels have it (16, 32, 64, 128 or 256).
        operands: ``"bfloat16"``, or ``"float32"`` for everything that is multiplied as TF32 or float32.
        grouped: whether several query heads share a key/value head.
    """

    width: int
    operands: str
    grouped: bool

    @classmethod
    def of(cls, width: int, dtype: torch.dtype, groups: int = 1) -> ShapeClass:
        """The class of a call."""
        return cls(width, "bfloat16" if dtype == torch.bfloat16 else "float32", groups > 1)

    def __str__(self) -> str:
        return f"{self.operands}/{self.width}/{'grouped' if self.grouped else 'single'}"


def setting_for(kernel: str, shape: ShapeClass, device: torch.device) -> Setting:
    """A kernel's setting: the one on trial, the user's own, the family's, the one for any GPU; in this order.

    Raises:
        KeyError: no file has one.
    """
    return _trials[kernel] if kernel in _trials else _measured(kernel, shape, device)


@lru_cache(maxsize=256)
def _measured(kernel: str, shape: ShapeClass, device: torch.device) -> Setting:
    own = _own_settings(device).get(own_key(kernel, str(shape))) if device.type == "cuda" else None
    if own is not None:
        return dict(own["setting"])
    for name in dict.fromkeys((family(device), "any")):
        for group in (str(shape), f"{shape.operands}/{shape.width}"):
            found = shipped(name).get("winners", {}).get(group, {}).get(kernel)
            if found is not None:
                return dict(found)
    raise KeyError(f"no setting for {kernel} at {shape}")


@lru_cache(maxsize=64)
def costs_for(width: int, backward: bool, device: torch.device) -> Costs:
    """The cost model of a pass at a head width: the user's own, the family's, or the Hopper's (ratios are what counts)."""
    kind = "backward" if backward else "forward"
    own = _own_settings(device).get(own_key("costs", f"{width}/{kind}")) if device.type == "cuda" else None
    if own is not None:
        return Costs(**own["setting"])
    table = shipped(family(device)).get("costs") or shipped("hopper")["costs"]
    nearest = min(table, key=lambda known: abs(math.log2(int(known) / width)))
    return Costs(**table[nearest][kind])


_trials: dict[str, Setting] = {}
_generation = 0


@contextmanager
def on_trial(kernel: str, setting: Setting) -> Iterator[None]:
    """Run a kernel with this setting, whatever was measured; in the whole process, for backward runs in another thread."""
    before = _trials.copy()
    _trials[kernel] = setting
    _change()
    try:
        yield
    finally:
        _trials.clear()
        _trials.update(before)
        _change()


def now_on_trial() -> dict[str, Setting]:
    """What is on trial now, by kernel; a process that is to run the same settings needs to know."""
    return dict(_trials)


def generation() -> int:
    """Changes whenever settings do; what is derived from settings may be kept as long as this stays."""
    return _generation


def _change() -> None:
    global _generation
    _generation += 1


def family(device: torch.device) -> str:
    """``"hopper"``, ``"ampere"``, ``"blackwell"``, or ``"any"``."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "any"
    return _FAMILIES.get(torch.cuda.get_device_capability(device)[0], "any")


@lru_cache
def shipped(name: str) -> dict[str, Any]:
    """The shipped settings of a family; empty where there are none."""
    path = _FOLDER / "winners" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


# ── what this machine found itself ───────────────────────────────────────────────────────────────────────────────────


def own_file(device: torch.device) -> Path:
    """Where a user's own settings for this GPU are kept."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return cache_folder() / "tuned" / f"{'-'.join(name.lower().split())}.json"


def cache_folder() -> Path:
    """``$POWER_RETENTION_CACHE``, or the user's cache folder."""
    if folder := os.environ.get("POWER_RETENTION_CACHE"):
        return Path(folder)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "power-retention"


def own_key(kernel: str, what: str) -> str:
    """What a user's own setting is kept under."""
    return f"{kernel}/{what} source-{_source(kernel)} triton-{_triton_version()}"


def keep_own(device: torch.device, entries: Mapping[str, Mapping[str, Any]]) -> Path:
    """Add settings to the user's own, each ``{"setting": …}`` and whatever is worth noting; returns the file.

    Raises:
        OutputError: the file cannot be written.
    """
    path = own_file(device)
    with clear_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**_read_own(path), **entries})
    forget()
    return path


def forget() -> None:
    """Read the files again when the next kernel needs them."""
    for cached in (_measured, costs_for, _own_settings):
        cached.cache_clear()
    _change()


@lru_cache
def _own_settings(device: torch.device) -> dict[str, Any]:
    return _read_own(own_file(device))


def _read_own(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(entry["setting"], dict) for entry in settings.values()):
            raise ValueError("an entry has no setting")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        message = f"{path} is damaged ({type(error).__name__}: {error}), so shipped settings are used; "
        warnings.warn(message + "delete it or run `power-retention tune` again.", RuntimeWarning, stacklevel=2)
        return {}
    return dict(settings)


@lru_cache
def _source(kernel: str) -> str:
    digest = hashlib.sha256()
    for name in ("common", *KERNEL_FILES[kernel]):
        digest.update((_FOLDER / f"{name}.py").read_bytes())
    return digest.hexdigest()[:12]


@lru_cache
def _triton_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"
