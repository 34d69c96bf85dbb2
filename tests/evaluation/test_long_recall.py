"""Associative recall for mixers alone: its sequences, what states weigh, and that a state recalls what a window cannot."""

from __future__ import annotations

import pytest
import torch

from power_retention.errors import ArgumentError
from power_retention.evaluation.long.recall import (
    IGNORED,
    LENGTHS,
    Contender,
    RecallLength,
    RecallModel,
    RecallSettings,
    draw_recall,
    measure,
    smallest_states,
    usual_contenders,
)
from power_retention.ops import PowerState

CPU = torch.device("cpu")
TINY = RecallSettings(64, 32, 2, 1, (RecallLength(4, 32),), steps=120, tokens=1024, learning_rate=1e-2, tested=64)


class TestSequences:
    @pytest.mark.parametrize("length", [RecallLength(4, 16), RecallLength(5, 64), RecallLength(32, 256)])
    def test_every_query_has_its_value_before_it(self, length: RecallLength) -> None:
        ids, labels = draw_recall(6, length, 128, torch.Generator().manual_seed(0))
        assert ids.shape == labels.shape == (6, length.tokens)
        stored = 2 * length.pairs
        for row, wanted in zip(ids.tolist(), labels.tolist(), strict=True):
            keys, values = row[0:stored:2], row[1:stored:2]
            assert len(set(keys)) == len(set(values)) == length.pairs
            assert max(keys) < 64 <= min(values)
            asked = [(row[place], wanted[place]) for place in range(len(row)) if wanted[place] != IGNORED]
            assert sorted(asked) == sorted(zip(keys, values, strict=True))
            assert all(label == IGNORED for label in wanted[:stored])

    def test_most_keys_come_back_soon(self) -> None:
        _, labels = draw_recall(400, RecallLength(4, 256), 128, torch.Generator().manual_seed(0))
        gaps = (labels != IGNORED).nonzero()[:, 1] - 8
        assert (gaps % 2 == 0).all()
        # Gaps n of probability ∝ 1/n: half of all are below the square root of the longest.
        assert 0.4 < float((gaps / 2 < 124**0.5).double().mean()) < 0.75

    def test_refusal(self) -> None:
        with pytest.raises(ArgumentError, match="8 pairs need at least 32 tokens"):
            draw_recall(1, RecallLength(8, 24), 128, torch.Generator())


class TestContenders:
    @pytest.mark.parametrize(("p", "d"), [(2, 8), (2, 16), (4, 8)])
    def test_a_state_weighs_what_it_says(self, p: int, d: int) -> None:
        state = PowerState.empty(1, 2, d, p=p)
        contender = Contender("state", d, power=p)
        assert contender.state_bytes(2, 1, 1000) == state.memory.nbytes + state.normalizer.nbytes
        window = contender.matched_window()
        assert window.state_bytes(2, 1, 10**6) <= contender.state_bytes(2, 1, 1000)
        assert window.state_bytes(2, 1, 10**6) > 0.9 * contender.state_bytes(2, 1, 1000)

    def test_attention_weighs_all_it_has_read(self) -> None:
        assert Contender("attention", 8).state_bytes(2, 1, 100) == 2 * 2 * 8 * 100 * 4

    def test_usual_ones_differ_in_size(self) -> None:
        contenders = usual_contenders()
        assert len({contender.name for contender in contenders}) == len(contenders)
        windows = [contender.window for contender in contenders if contender.window]
        assert windows
        assert max(windows) < LENGTHS[-1].tokens

    def test_a_window_does_not_see_past_itself(self) -> None:
        torch.manual_seed(0)
        ids = torch.randint(64, (1, 40))
        other = ids.clone()
        other[0, :20] = torch.randint(64, (20,))
        rows = torch.zeros(1, 40, dtype=torch.bool)
        rows[0, 30:] = True
        for window, same in ((8, True), (None, False), (35, False)):
            model = RecallModel(Contender("window", 8, window=window), TINY)
            assert torch.allclose(model(ids, rows), model(other, rows), atol=1e-5) == same


def test_a_state_recalls_what_a_window_of_its_size_cannot() -> None:
    """Trained alike for seconds: four pairs are in the state, and long out of a window of four tokens."""
    state = Contender("state", 8, power=2)
    window = Contender("short window", 8, window=4)
    recalled = {x.name: measure(x, TINY, seed=0, device=CPU)[0]["accuracy"] for x in (state, window)}
    assert recalled["state"] > 0.8
    assert recalled["short window"] < 0.3


def test_smallest_states() -> None:
    def row(name: str, power: int | None, size: int, pairs: int, accuracy: float) -> dict[str, object]:
        return {"name": name, "power": power, "state_bytes": size, "pairs": pairs, "accuracy": accuracy}

    rows = [
        row("small", 2, 10, 4, 0.99), row("small", 2, 10, 4, 0.93), row("small", 2, 10, 8, 0.5),
        row("large", 2, 99, 4, 1.0), row("large", 2, 99, 8, 0.97), row("large", 2, 99, 16, 0.2),
        row("window", None, 5, 16, 1.0),
    ]  # fmt: skip
    assert smallest_states(rows) == [
        {"pairs": 4, "name": "small", "state_bytes": 10},
        {"pairs": 8, "name": "large", "state_bytes": 99},
        {"pairs": 16, "name": None, "state_bytes": None},
    ]
