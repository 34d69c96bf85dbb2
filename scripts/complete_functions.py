"""Whether functions that a model finishes are Python, beside its parent and the hard swap.

    python scripts/complete_functions.py MODEL FOLDER OUT.json [--count 100]

Top-level functions of the Python files in FOLDER, cut after the first statement of their body, are finished greedily, with
as much room as the rest of them took and a dozen tokens more.  What is written up to the end of the function, or to its last
whole line, is parsed together with what was given.  A function finished so is valid or not; it need not do what it should.
Printed are the shares of valid ones, with standard errors; the real functions are among what is written.
"""

from __future__ import annotations

import argparse
import ast
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from power_retention.cli.options import open_noted_teacher, open_student
from power_retention.conversion.convert import hard_swap
from power_retention.evaluation.generated import Free, generate_answers
from power_retention.evaluation.long.asking import Effort
from power_retention.evaluation.long.context import Encoder
from power_retention.evaluation.long.readers import AttentionReader, StateReader
from power_retention.evaluation.recovery import mean
from power_retention.files import write_json

BEFORE = 600
"""Characters of the file before the function that are read with it."""


@dataclass(frozen=True)
class Function:
    """A function in two parts, and what stands before it."""

    before: str
    given: str
    rest: str


def functions(folder: Path, rng: random.Random) -> Iterator[Function]:
    """One a file, in random order."""
    paths = sorted(folder.rglob("*.py"))
    for path in rng.sample(paths, len(paths)):
        text = path.read_text(encoding="utf-8", errors="replace")
        try:
            defined = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
        except (SyntaxError, ValueError):
            continue
        whole = [_function(text, node) for node in defined]
        long = [function for function in whole if 4 <= function.rest.count("\n") <= 13]
        if long:
            yield rng.choice(long)


def _function(text: str, node: ast.FunctionDef) -> Function:
    lines = text.splitlines(keepends=True)
    end = node.body[0].end_lineno or node.lineno
    before = "".join(lines[: node.lineno - 1])[-BEFORE:]
    given = "".join(lines[node.lineno - 1 : end]).removesuffix("\n")  # tokens of line ends have what follows them
    return Function(before, given, "\n" + "".join(lines[end : node.end_lineno]))


def is_valid(given: str, written: str) -> bool:
    """Whether the function is Python up to where it ends, or to its last whole line, and has got a line more."""
    match = re.search(r"^(?=[^\s#])", written, re.MULTILINE)
    body = written[: match.start()] if match else written[: written.rfind("\n") + 1]
    if not body.strip():
        return False
    try:
        ast.parse(given + body)
    except (SyntaxError, ValueError):
        return False
    return True


def main() -> None:
    """Finish, parse, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--teacher")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    student, source = open_student(arguments.model).eval(), open_noted_teacher(arguments.model, arguments.teacher)
    encoder = Encoder(source.tokenizer)
    found = functions(arguments.folder, random.Random(arguments.seed))
    asked = [function for _, function in zip(range(arguments.count), found, strict=False)]
    questions = [Free(f.before + f.given, ("?",), (f.rest,)) for f in asked]
    swapped = hard_swap(source.model, student.config.power).eval()
    readers = {
        "teacher": AttentionReader(source.model),
        "hard swap": StateReader(swapped),
        "student": StateReader(student),
    }
    report = {
        "functions": len(asked),
        "real": mean(np.array([float(is_valid(f.given, f.rest)) for f in asked])).to_dict(),
    }
    texts = {}
    for name, reader in readers.items():
        texts[name] = generate_answers(reader, questions, encoder, Effort.usual(reader.device))
        valid = np.array([float(is_valid(f.given, text)) for f, text in zip(asked, texts[name], strict=True)])
        report[name] = mean(valid).to_dict()
        print(
            f"{name:9} {100 * valid.mean():.0f} ± {100 * mean(valid).error:.0f} % of {len(asked)} functions are Python"
        )
    samples = [{"given": f.given, **{name: text[i] for name, text in texts.items()}} for i, f in enumerate(asked[:5])]
    write_json(arguments.out, report | {"samples": samples})


if __name__ == "__main__":
    main()
