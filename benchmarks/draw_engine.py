"""Draws what ``engine.py`` measured: time a step against batch and against context.

python benchmarks/draw_engine.py REPORT.json OUT.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from power_retention.evaluation.drawing import figure_file, tidy

STYLES = {"states in float32": "C0", "states in bfloat16": "C2", "transformer": "C1"}
BATCHES = ((1, ":"), (32, "-"))
"""Drawn against context, and how."""


def draw(report: dict[str, Any], out: Path) -> None:
    with figure_file(out, 1, 2, size=(11, 4.2)) as (_, (left, right)):
        for name, colour in STYLES.items():
            rows = [row for row in report["parts"].get(name, {}).get("rows", []) if "batch" in row]
            for context in (1024, 4096):
                points = sorted((row["batch"], row["ms a step"]) for row in rows if row["context"] == context)
                if len(points) > 2:
                    style = "-" if context == 1024 else "--"
                    left.plot(
                        *zip(*points, strict=True), style, color=colour, marker="o", label=f"{name}, {context:,} tokens"
                    )
            for batch, style in BATCHES:
                points = sorted((row["context"], row["ms a step"]) for row in rows if row["batch"] == batch)
                if len(points) > 1:
                    right.plot(
                        *zip(*points, strict=True), style, color=colour, marker="o", label=f"{name}, batch {batch}"
                    )
        left.set(xlabel="requests at once", ylabel="ms a step", ylim=(0, None))
        right.set(xscale="log", yscale="log", xlabel="tokens read before", ylabel="ms a step")
        right.yaxis.set_major_locator(FixedLocator([2, 4, 8, 16, 32]))
        right.yaxis.set_major_formatter(ScalarFormatter())
        right.yaxis.set_minor_locator(NullLocator())
        for axis in (left, right):
            tidy(axis)
            axis.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
