"""The grid of calls that the kernels are checked on: widths × dtypes × forms × lengths × groups × packing × states × gates.

The same cases at two sizes: on a GPU several tiles a chunk, under Triton's interpreter a few tokens.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))

from triton_cases import TOLERANCES, Case

WIDTHS = (64, 128, 256, 32, 16)
ODD_WIDTHS = ((12, 20), (80, 48), (96, 128), (64, 128), (128, 64), (200, 72))


def grid(*, small: bool = False) -> dict[str, Case]:
    """Cases by name, the most important first; ``small`` for the interpreter."""
    tokens, chunk = (37, 16) if small else (707, 256)
    runs = (5, 25, 7) if small else (5, 300, 1, 94)
    base = Case(tokens=tokens, chunk=chunk, dtype=torch.float32 if small else torch.bfloat16, strongest=-0.5)
    kinds = {
        "chunks": replace(base, batch=2, heads=(2, 2)),
        "states in and out, grouped": replace(base, heads=(4, 2), state=True),
        "attention": replace(base, chunk=0, heads=(4, 2)),
        "packed, with states": replace(base, tokens=sum(runs), runs=runs, heads=(2, 2), state=True),
        "forgets everything": replace(base, strongest=-300.0, state=True),
        "no gates": replace(base, strongest=None, state=True),
        "attention, p = 4": replace(base, chunk=0, p=4, heads=(4, 2)),
        "no gates, no states": replace(base, strongest=None),
    }
    widths = (16, 32) if small else WIDTHS
    cases = {
        f"{kind}, width {width}": replace(case, widths=(width, width))
        for kind, case in kinds.items()
        for width in widths
    }
    full = kinds["states in and out, grouped"]
    for d, e in ODD_WIDTHS[:1] if small else ODD_WIDTHS:
        cases[f"widths {d} and {e}"] = replace(full, widths=(d, e))
    for length in (1, 2, chunk - 1, chunk, chunk + 1, 2 * chunk):
        cases[f"{length} tokens"] = replace(full, tokens=length, widths=(16, 16) if small else (64, 64))
    cases["attention, p = 6, packed"] = replace(kinds["attention"], p=6, tokens=sum(runs), runs=runs)
    for dtype in (torch.float16, torch.float32):
        for width in (16,) if small else (64, 32, 16, 128):
            cases[f"{str(dtype)[6:]}, width {width}"] = replace(full, widths=(width, width), dtype=dtype)
    return cases


def tolerance(case: Case, what: str) -> float:
    """Largest relative error allowed in a result.

    The gates' gradients are differences of flows.  Where gates forget everything they are near zero and the flows are not;
    and with random gradients of a final state the flows through it are far larger than what is left of them.  In bfloat16
    they are held against the flows themselves.
    """
    if what != "d log_g" or case.dtype == torch.bfloat16:
        return TOLERANCES[case.dtype]
    forgets = case.strongest is not None and case.strongest < -100
    return TOLERANCES[case.dtype] * (20 if forgets else 2 if case.state else 1)
