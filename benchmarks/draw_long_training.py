"""Draws what ``long_training.py`` measured: tokens a second of a whole step against the length of its one document.

python benchmarks/draw_long_training.py OUT.png RESULTS.json …
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.ticker import StrMethodFormatter

from power_retention.evaluation.drawing import figure_file, tidy

KINDS = {
    "ours": ("power retention", "C0"),
    "ours, batch": ("power retention, eight documents", "C2"),
    "transformer": ("Transformer, FlashAttention", "C1"),
}
"""How each is called and coloured."""


def draw(results: list[Path], out: Path) -> None:
    with figure_file(out, 1, len(results), size=(5.5 * len(results), 4.2), squeeze=False) as (_, axes):
        for axis, path in zip(axes[0], results, strict=True):
            rows = [row for row in json.loads(path.read_text(encoding="utf-8"))["rows"] if row["tokens_per_second"]]
            rows = [row for row in rows if "compiling" not in row["note"]]
            for kind, (label, colour) in KINDS.items():
                # A length may be there twice, its layers computed again the second time: the faster one counts.
                found: dict[int, float] = {}
                for row in rows:
                    if row["kind"] == kind:
                        found[row["tokens"]] = max(found.get(row["tokens"], 0.0), row["tokens_per_second"])
                if found:
                    points = sorted(found.items())
                    axis.plot(*zip(*points, strict=True), "o-", color=colour, label=label)
            axis.set(xscale="log", ylim=(0, None), xlabel="tokens of a document", ylabel="tokens a second")
            axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            axis.set_title(f"SmolLM2-{rows[0]['model'].upper()}'s shape", fontsize=10)
            tidy(axis)
            axis.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    draw([Path(name) for name in sys.argv[2:]], Path(sys.argv[1]))
