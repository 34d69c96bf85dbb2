"""Whether a program that a model wrote passes its tests: it is run, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

SECONDS = 10

Scored = dict[str, float]


def humaneval(document: Mapping[str, Any], results: Sequence[str]) -> Scored:
    """pass@1 of a function's body (HumanEval, Chen et al. 2021), as lm-evaluation-harness calls for it."""
    program = f"{document['prompt']}{results[0]}\n{document['test']}\ncheck({document['entry_point']})\n"
    return {"pass_at_1": float(passes(program))}


def mbpp(document: Mapping[str, Any], results: Sequence[str]) -> Scored:
    """pass@1 of a program (MBPP, Austin et al. 2021), as lm-evaluation-harness calls for it."""
    program = "\n".join((results[0], document.get("test_setup_code") or "", *document["test_list"]))
    return {"pass_at_1": float(passes(program))}


_END = "the end was reached"

# Reads the program from standard input.  One that leaves before its end, sys.exit(0) say, has not passed its tests.
_RUNNER = f"""
import sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
except ImportError:
    pass
exec(compile(sys.stdin.read(), "program", "exec"), {{"__name__": "__main__"}})
print({_END!r})
"""


def passes(program: str) -> bool:
    """Whether a Python program runs to its end without an error, within ten seconds and 4 GB.

    It is kept from hanging and from filling the memory, and from nothing else: it can read and delete what you can.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            ended = subprocess.run(
                [sys.executable, "-I", "-c", _RUNNER],
                input=program.encode("utf-8", "replace"),
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    return ended.returncode == 0 and ended.stdout.rstrip().endswith(_END.encode())
