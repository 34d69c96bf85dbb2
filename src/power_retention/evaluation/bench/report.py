"""What the numbers of a report say: speed-ups where both sides are right, and where the lines cross."""

from __future__ import annotations

import math
from typing import Any

import torch

from power_retention.evaluation.bench.contenders import OURS
from power_retention.evaluation.bench.settings import TOLERANCES


def speed_ups(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Per shape, pass and length: our time, the fastest right attention's, their ratio, and the choice's regret.

    The ratio is None where one of the two failed a check: at this length, or outputs and gradients at the checked one.
    """
    rows = []
    for shape, what, tokens in _cases(report):
        at = {
            r["contender"]: r for r in report["times"] if (r["shape"], r["pass"], r["tokens"]) == (shape, what, tokens)
        }
        trusted = {name: r for name, r in at.items() if "ms" in r and _row_is_right(report, r)}
        theirs = [r for r in trusted.values() if not r["power"]]
        own = [r["ms"]["median"] for name, r in trusted.items() if name.startswith(OURS)]
        ours, best = trusted.get(OURS), min(theirs, key=lambda r: r["ms"]["median"], default=None)
        median = None if ours is None else ours["ms"]["median"]
        rows.append(
            {
                "shape": shape,
                "pass": what,
                "tokens": tokens,
                "ours": median,
                "attention": None if best is None else best["ms"]["median"],
                "attention_name": None if best is None else best["contender"],
                "ratio": None if median is None or best is None else best["ms"]["median"] / median,
                "memory": _memory_ratio(trusted.get(OURS), best),
                "over_best_form": None if median is None else median / min(own),
            }
        )
    return rows


def _memory_ratio(ours: dict[str, Any] | None, attention: dict[str, Any] | None) -> float | None:
    """Our peak memory over the attention's; None on a CPU."""
    if ours is None or attention is None or "peak_gb" not in ours:
        return None
    return float(ours["peak_gb"] / attention["peak_gb"])


def crossover(report: dict[str, Any], shape: str, what: str) -> float | None:
    """Length from which we stay faster than the fastest attention; between measured lengths on a log-log line."""
    points = [
        (r["tokens"], r["ratio"]) for r in speed_ups(report) if (r["shape"], r["pass"]) == (shape, what) and r["ratio"]
    ]
    slower = [i for i, (_, ratio) in enumerate(points) if ratio < 1]
    if not points or (slower and slower[-1] == len(points) - 1):
        return None
    if not slower:
        return float(points[0][0])
    (t0, r0), (t1, r1) = points[slower[-1]], points[slower[-1] + 1]
    share = -math.log(r0) / (math.log(r1) - math.log(r0))
    return float(t0 * (t1 / t0) ** share)


def _cases(report: dict[str, Any]) -> list[tuple[str, str, int]]:
    return list(dict.fromkeys((r["shape"], r["pass"], r["tokens"]) for r in report["times"]))


def is_right(report: dict[str, Any], name: str, shape: str) -> bool:
    """Whether a contender's outputs and gradients were right at a shape."""
    return any(
        check["verdict"] == "right"
        for check in report["checks"]
        if (check["contender"], check["shape"]) == (name, shape)
    )


def _row_is_right(report: dict[str, Any], row: dict[str, Any]) -> bool:
    allowed = TOLERANCES[getattr(torch, report["dtype"])]
    error = row["sampled_error"]  # None where the output was not finite
    return is_right(report, row["contender"], row["shape"]) and error is not None and error <= allowed
