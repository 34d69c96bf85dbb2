"""Trains one-layer mixers for multi-query associative recall and holds what they recall against the size of their state.

    python benchmarks/recall.py results.json [--quick] [--seeds N] [--steps N] [--only NAME …] [--redraw]

Power retention of several widths and powers, softmax attention over a window that weighs as much as each of these states, and
over everything.  Prints a line a contender, writes JSON and, beside it, a PNG.  On one GPU a contender takes about
half a minute a seed; with --quick, on one core of a computer, about one.  What the file holds already is not measured again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from earlier import earlier, measured_where
from power_retention.evaluation.drawing import PLAIN_COLOUR, TEACHER_COLOUR, figure_file, tidy
from power_retention.evaluation.long.recall import (
    Contender,
    RecallSettings,
    measure,
    smallest_states,
    usual_contenders,
)
from power_retention.files import write_json

POWER_COLOURS = ("#a9cce3", "#7fb3d5", "#5499c7", "#2f6690", "#7a9e7e", "#3d6b45")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--quick", action="store_true", help="small enough for one core")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, help="of training")
    parser.add_argument("--only", nargs="*", default=[], help="contenders, by name")
    parser.add_argument("--redraw", action="store_true", help="draw the figure of earlier results again")
    options = parser.parse_args()
    report = json.loads(options.out.read_text()) if options.redraw else run(options)
    draw(report, options.out.with_suffix(".png"))


def run(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() and not options.quick else "cpu")
    settings = RecallSettings.quick() if options.quick else RecallSettings()
    if options.steps:
        settings = RecallSettings(**{**vars(settings), "steps": options.steps})
    contenders = quick_contenders() if options.quick else usual_contenders()
    chosen = [contender for contender in contenders if not options.only or contender.name in options.only]
    sizes = {**vars(settings), "lengths": [list(length) for length in settings.lengths]}
    same = {**measured_where(), "settings": sizes}
    report = earlier(options.out, same)
    rows: list[dict[str, Any]] = report.get("rows", [])
    measured = {(row["name"], row["seed"]) for row in rows}
    for contender in chosen:
        for seed in range(options.seeds):
            if (contender.name, seed) in measured:
                continue
            rows += measure(contender, settings, seed=seed, device=device)
            shown = ", ".join(f"{row['pairs']}: {row['accuracy']:.3f}" for row in rows[-len(settings.lengths) :])
            print(f"{contender.name}, seed {seed}, {rows[-1]['state_bytes']:,} bytes: {shown}", flush=True)
            report = {**same, "rows": rows, "smallest_states": smallest_states(rows)}
            write_json(options.out, report)
    for entry in report.get("smallest_states", []):
        needed = f"{entry['name']}, {entry['state_bytes']:,} bytes" if entry["name"] else "none of these states"
        print(f"95 % of {entry['pairs']} pairs: {needed}")
    return report


def quick_contenders() -> list[Contender]:
    state = Contender("p 2, d 8", 8, power=2)
    return [state, state.matched_window(), Contender("attention, d 8", 8)]


def draw(report: dict[str, Any], path: Path) -> None:
    with figure_file(path, 1, 2, size=(11, 4.2)) as (figure, (against_pairs, against_bytes)):
        rows = report["rows"]
        names = list(dict.fromkeys(row["name"] for row in rows))
        powers = [name for name in names if any(row["name"] == name and row["power"] for row in rows)]
        for name in names:
            mine = [row for row in rows if row["name"] == name]
            if name in powers:
                colour, style = POWER_COLOURS[powers.index(name) % len(POWER_COLOURS)], "o-"
            else:
                colour, style = (PLAIN_COLOUR, "s--") if mine[0]["window"] else (TEACHER_COLOUR, "o-")
            pairs = sorted({row["pairs"] for row in mine})
            means = [_mean(row["accuracy"] for row in mine if row["pairs"] == count) for count in pairs]
            against_pairs.plot(pairs, means, style, ms=4, color=colour, label=name)
            if name in powers or mine[0]["window"]:
                recalled = max(count * mean for count, mean in zip(pairs, means, strict=True))
                against_bytes.plot(mine[-1]["state_bytes"], recalled, style[0], color=colour, ms=7)
                against_bytes.annotate(f" {name}", (mine[-1]["state_bytes"], recalled), fontsize=7)
        against_pairs.set_xscale("log", base=2)
        against_pairs.set_ylim(-0.03, 1.03)
        against_pairs.set_xlabel("pairs")
        against_pairs.set_ylabel("values recalled")
        against_pairs.legend(frameon=False, fontsize=7)
        against_bytes.set_xscale("log", base=2)
        against_bytes.set_yscale("log", base=2)
        against_bytes.set_xlabel("bytes of state at the longest sequence, float32")
        against_bytes.set_ylabel("most pairs recalled × share")
        for axis in (against_pairs, against_bytes):
            tidy(axis)
        figure.suptitle(f"Multi-query associative recall, {report['device']}", fontsize=10)


def _mean(values: Any) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


if __name__ == "__main__":
    main()
