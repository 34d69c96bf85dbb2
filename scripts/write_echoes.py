"""Write documents whose passages come back, for a model that is to learn to look far back: each is some passages of other
documents, and then some of them again.

    python scripts/write_echoes.py echo.jsonl wikipedia.jsonl:5 python.jsonl:3 chat.jsonl [--megabytes 22]

Inputs are JSONL files with a field "text", each with the weight that its passages are drawn with (1 where none is named).
Documents that `retrain` holds out by default are left out here too.  The same call writes the same file.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from power_retention.files import json_line, replacement
from power_retention.training.text import read_documents, split_held_out

MOST_PASSAGES = 5
SHORTEST, LONGEST = 128, 2048
"""Characters of a passage, drawn by the logarithm."""
MOST_CHARACTERS = 12_000


def passage(text: str, rng: random.Random) -> str:
    """A piece of a text, shorter where the text is."""
    size = int(SHORTEST * (LONGEST / SHORTEST) ** rng.random())
    start = rng.randint(0, max(0, len(text) - size))
    return text[start : start + size]


def echoing(texts: list[str], rng: random.Random) -> str:
    """Passages, and then some of them again in another order."""
    passages = [passage(rng.choice(texts), rng) for _ in range(rng.randint(1, MOST_PASSAGES))]
    again = rng.sample(passages, rng.randint(1, len(passages)))
    return "\n\n".join(passages + again)[:MOST_CHARACTERS]


def main() -> None:
    """Draw until there is enough."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("sources", nargs="+", metavar="FILE[:WEIGHT]")
    parser.add_argument("--megabytes", type=float, default=22.0)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    parted = [source.partition(":") for source in arguments.sources]
    pools = [split_held_out(read_documents([Path(name)]))[0] for name, _, _ in parted]
    weights = [float(weight or 1) for _, _, weight in parted]
    written = 0
    with replacement(arguments.out) as temporary, temporary.open("w", encoding="utf-8") as file:
        while written < 1e6 * arguments.megabytes:
            text = echoing(rng.choices(pools, weights)[0], rng)
            written += len(text)
            file.write(json_line({"text": text}))


if __name__ == "__main__":
    main()
