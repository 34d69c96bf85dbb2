"""The load test, in twenty seconds: everybody who asks is answered as if alone, and nothing is left behind."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import cast

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import load_test
from load_clients import CLOSE, Judge, Written


@pytest.mark.skipif(sys.platform == "win32", reason="ends servers with POSIX signals")
def test_users_who_come_go_and_vanish(tmp_path: Path) -> None:
    report, rounds = load_test.load_test("own", 0.1, 0, tmp_path)
    assert report["faults"] == []
    assert report["worst log-probability difference"] < CLOSE
    assert report["lives"] == 2
    did = report["counts"]
    assert all(did[what] for what in ("complete", "chat", "state", "refused", "hung up", "alone")), did
    assert did["states until the number is reached"] > 2
    assert did["states found again after SIGKILL"] > 0
    assert max(one.resident_mb for one in rounds) - min(one.resident_mb for one in rounds) < 40
    load_test.draw(rounds, tmp_path / "load.png", "in small")
    assert (tmp_path / "load.png").stat().st_size > 1000


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    return Judge(load_test.write_model(tmp_path_factory.mktemp("judged")))


def test_a_wrong_answer_is_seen(judge: Judge) -> None:
    """One token of the past forgotten, one told otherwise, or another one written."""
    draw = random.Random(0)
    before = [draw.randrange(3, 512) for _ in range(40)]
    with torch.no_grad():
        likely = judge.exact(torch.tensor([before])).logits[0, -1].log_softmax(-1)
    best, second = likely.topk(2).indices.tolist()
    right = Written([best], [float(likely[best])])
    assert not judge.fault(before, right, greedy=True)
    assert "from those of one user" in judge.fault(before[1:], right, greedy=True)
    assert "from those of one user" in judge.fault(before, Written([best], [float(likely[best]) - 0.01]), greedy=True)
    other = Written([second], [float(likely[second])])
    assert not judge.fault(before, other, greedy=False)
    assert "less likely" in judge.fault(before, other, greedy=True)
    assert judge.fault(before, Written([best], []), greedy=True)


def test_rounding_of_a_delicate_answer_is_no_fault(judge: Judge) -> None:
    """One that is as far from float64 as float32 is, read in other pieces; further away it is one."""
    text = [
        240,
        326,
        150,
        467,
        56,
        194,
        131,
        342,
        465,
        303,
        331,
        267,
        344,
        330,
        426,
        410,
        13,
        436,
        265,
        282,
        412,
        419,
        426,
    ]
    before, tokens = text[:10], [*text[10:], 410, 325, 406, 432, 398, 358, 286, 261, 419, 426]
    with torch.no_grad():
        rounded = judge.rounded(torch.tensor([[*before, *tokens]])).logits[0, 9:-1].log_softmax(-1)
    told = rounded[torch.arange(len(tokens)), torch.tensor(tokens)].tolist()
    assert not judge.fault(before, Written(tokens, told), greedy=False)
    assert judge.fault(before, Written(tokens, [told[0] - 0.02, *told[1:]]), greedy=False)


def test_remains_of_a_killed_server_are_no_fault_of_the_next(tmp_path: Path) -> None:
    load = load_test.Load(cast(load_test.World, None), 0)
    assert load.left_in(tmp_path / "nowhere") == []
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / ".first.pinned").touch()
    load.remains.update(left := load.left_in(tmp_path))
    assert [path.name for path in left] == [".first.pinned"]
    (tmp_path / ".second.pinned").touch()
    assert [path.name for path in load.left_in(tmp_path)] == [".second.pinned"]


def test_growth_is_told_from_noise() -> None:
    noise = random.Random(0)

    def rounds(growth: float) -> list[load_test.Round]:
        return [
            load_test.Round(
                life, "", requests, 0, 500 + 20 * life + growth * requests / 1000 + noise.gauss(0, 0.5), 7, 9, 1
            )
            for life in (1, 2)
            for requests in range(10, 2000, 50)
        ]

    flat = load_test.trend(rounds(0.0), lambda one: one.resident_mb)
    assert abs(flat["slope"]) < 4 * flat["error"] < 1
    leaking = load_test.trend(rounds(5.0), lambda one: one.resident_mb)
    assert leaking["slope"] == pytest.approx(5, abs=4 * leaking["error"])


def test_rounding_of_a_state_of_one_token_is_no_fault(judge: Judge) -> None:
    """vLLM puts a prompt of one token into the state, one user alone into the ring: queries that hardly find it differ."""
    before, tokens = [502], list[int]()
    with torch.no_grad():
        for _ in range(4):
            tokens.append(int(judge.exact(torch.tensor([before + tokens])).logits[0, -1].argmax()))
        read = judge._likelihoods_from_state(judge.rounded, before, tokens)
    told = read[torch.arange(4), torch.tensor(tokens)].tolist()
    delicate = judge.delicate
    assert not judge.fault(before, Written(tokens, told), greedy=True)
    assert judge.delicate == delicate + 1
    told[1] += 0.1
    assert "from those of one user" in judge.fault(before, Written(tokens, told), greedy=True)
