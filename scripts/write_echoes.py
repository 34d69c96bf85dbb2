"""Write documents for a model that is to learn to look far back: each is some passages of other documents, and then some of
them again; or, with --asking, passages with made-up facts strewn among them, and then questions about these with their answers.

    python scripts/write_echoes.py echo.jsonl wikipedia.jsonl:5 python.jsonl:3 chat.jsonl [--megabytes 22]
    python scripts/write_echoes.py asked.jsonl wikipedia.jsonl:5 chat.jsonl --asking --characters 16000

Inputs are JSONL files with a field "text", each with the weight that its passages are drawn with (1 where none is named).
Documents that `retrain` holds out by default are left out here too.  The same call writes the same file.
"""

from __future__ import annotations

import argparse
import random
import re
from pathlib import Path
from typing import NamedTuple

from power_retention.files import json_line, replacement
from power_retention.training.text import read_documents, split_held_out

MOST_PASSAGES = 5
SHORTEST, LONGEST = 128, 2048
"""Characters of a passage, drawn by the logarithm."""
FEWEST_CHARACTERS = 600
"""Of a document with questions, whose lengths are drawn by the logarithm too."""


class Fact(NamedTuple):
    """A sentence, and how what it says is asked for."""

    said: str
    asked: str
    answer: str


FACTS = (
    Fact("The {noun} of {name} is {value}.", "What is the {noun} of {name}? The {noun} of {name} is", " {value}."),
    Fact(
        "{name} keeps the {noun} under number {value}.",
        "Under which number does {name} keep the {noun}? {name} keeps the {noun} under number",
        " {value}.",
    ),
    Fact(
        "{name} took the {noun} to {word}.", "Where did {name} take the {noun}? {name} took the {noun} to", " {word}."
    ),
    Fact(
        "{name}: Please remember {value} for the {noun}.",
        "{name}: What was it for the {noun}? Please remember",
        " {value} for the {noun}.",
    ),
    Fact("Q: {noun} of {name}?\nA: {value}", "Q: {noun} of {name}?\nA:", " {value}"),
    Fact("| {name} | {noun} | {value} |", "| {name} | {noun} |", " {value} |"),
    Fact("{noun}_{low} = {value}", "{noun}_{low} =", " {value}"),
    Fact("[{low}]\n{noun} = {value}", "[{low}]\n{noun} =", " {value}"),
    Fact('"{low}": {{"{noun}": "{word}"}},', '"{low}": {{"{noun}":', ' "{word}"}},'),
    Fact("let {low} = {value}; let {noun}_2 = {low};", "{noun}_2 ==", " {value}"),
)
"""Questions end with the beginning of the sentence that answers them: without it a small teacher is three to ten times as
unsure of the answer, and what a teacher does not know cannot be learned from it."""
NOUNS = [
    "address",
    "badge",
    "code",
    "door",
    "height",
    "key",
    "limit",
    "parcel",
    "price",
    "room",
    "seat",
    "tower",
    "weight",
]
MOST_FACTS = 8


def passage(text: str, rng: random.Random) -> str:
    """A piece of a text, shorter where the text is."""
    size = int(SHORTEST * (LONGEST / SHORTEST) ** rng.random())
    start = rng.randint(0, max(0, len(text) - size))
    return text[start : start + size]


def echoing(texts: list[str], rng: random.Random, characters: int) -> str:
    """Passages, and then some of them again in another order."""
    passages = [passage(rng.choice(texts), rng) for _ in range(rng.randint(1, MOST_PASSAGES))]
    again = rng.sample(passages, rng.randint(1, len(passages)))
    return "\n\n".join(passages + again)[:characters]


def asking(texts: list[str], rng: random.Random, characters: int) -> str:
    """Passages with facts among them, and then questions about some of these with their answers."""
    size, passages = FEWEST_CHARACTERS * (characters / FEWEST_CHARACTERS) ** rng.random(), []
    while sum(map(len, passages)) < size:
        passages.append(passage(rng.choice(texts), rng))
    known = sorted(set(re.findall(r"\b[A-Z][a-z]{3,}\b", " ".join(passages)))) or ["Someone"]
    facts = [made_up(rng, known) for _ in range(rng.randint(1, MOST_FACTS))]
    for fact in facts:
        passages.insert(rng.randrange(len(passages)), fact.said)
    asked = rng.sample(facts, rng.randint(1, len(facts)))
    return "\n\n".join(passages + [fact.asked + fact.answer for fact in asked])


def made_up(rng: random.Random, known: list[str]) -> Fact:
    """A fact about names and words that are known."""
    name, word = rng.choice(known), rng.choice(known)
    value = str(rng.randint(1, 10 ** rng.randint(1, 7)))
    parts = {"name": name, "word": word, "low": name.lower(), "noun": rng.choice(NOUNS), "value": value}
    return Fact(*(text.format(**parts) for text in rng.choice(FACTS)))


def main() -> None:
    """Draw until there is enough."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("sources", nargs="+", metavar="FILE[:WEIGHT]")
    parser.add_argument("--megabytes", type=float, default=22.0)
    parser.add_argument("--characters", type=int, default=12_000, help="of the longest document, or nearly")
    parser.add_argument("--asking", action="store_true", help="facts and questions instead of passages that come back")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    parted = [source.partition(":") for source in arguments.sources]
    pools = [split_held_out(read_documents([Path(name)]))[0] for name, _, _ in parted]
    weights = [float(weight or 1) for _, _, weight in parted]
    write, written = asking if arguments.asking else echoing, 0
    with replacement(arguments.out) as temporary, temporary.open("w", encoding="utf-8") as file:
        while written < 1e6 * arguments.megabytes:
            text = write(rng.choices(pools, weights)[0], rng, arguments.characters)
            written += len(text)
            file.write(json_line({"text": text}))


if __name__ == "__main__":
    main()
