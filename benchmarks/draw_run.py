"""Draws a retraining that was probed: KL to the teacher and loss over the teacher's, by domain, against tokens.

python benchmarks/draw_run.py RUN_FOLDER OUT.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from power_retention.evaluation.drawing import figure_file, tidy


def draw(folder: Path, out: Path) -> None:
    recipe = json.loads((folder / "run.json").read_text(encoding="utf-8"))["recipe"]
    probes = [json.loads(line) for line in (folder / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]
    per_step = recipe["batch"] * recipe["length"]
    tokens = [probe["step"] * per_step / 1e6 for probe in probes]
    names = sorted(probes[-1]["domains"], key=lambda name: (probes[-1]["domains"][name]["kept_out"], name))
    with figure_file(out, 1, 2, size=(12, 4.6)) as (figure, (left, right)):
        for index, name in enumerate(names):
            domains = [probe["domains"][name] for probe in probes]
            style = {
                "color": f"C{index % 10}",
                "linestyle": "--" if domains[0]["kept_out"] else "-",
                "marker": "o",
                "markersize": 3,
            }
            left.plot(tokens, [d["kl"] for d in domains], label=name, **style)
            right.plot(tokens[1:], [100 * (d["loss"] / d["teacher_loss"] - 1) for d in domains[1:]], **style)
        left.set(yscale="log", xlabel="million tokens", ylabel="KL(teacher ‖ student), nats a token")
        right.set(xlim=left.get_xlim(), xlabel="million tokens", ylabel="loss over the teacher's, %")
        right.axhline(0, color="black", linewidth=1)
        right.annotate("teacher", (0, 0), xytext=(0, 3), textcoords="offset points")
        border = round(recipe["steps"] * recipe["align_share"]) * per_step / 1e6
        for axis in (left, right):
            axis.axvline(border, color="grey", linewidth=1, linestyle=":")
            tidy(axis)
        left.annotate("align | distil", (border, left.get_ylim()[1]), ha="center", va="top", color="grey")
        figure.legend(
            *left.get_legend_handles_labels(),
            loc="outside right center",
            frameon=False,
            title="– – no such text\nis learnt from",
        )


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
