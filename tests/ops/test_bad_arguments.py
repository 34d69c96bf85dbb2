"""Every refusal says what came and what was expected."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from problems import random_problem

from power_retention.errors import ArgumentError, StateError
from power_retention.ops import PowerState, power_retention, power_retention_step


def arguments() -> dict[str, Any]:
    """A good call: B = 1, T = 4, Hq = 4, H = 2, d = 3, e = 5, with a state."""
    problem = random_problem(tokens=4, heads=2, groups=2, d=3, e=5, states=1)
    return {"q": problem.q, "k": problem.k, "v": problem.v, "log_g": problem.log_g, "initial_state": problem.state}


def call(**changes: object) -> object:
    given = arguments() | changes
    return power_retention(given.pop("q"), given.pop("k"), given.pop("v"), given.pop("log_g"), **given)


def filled(*shape: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> torch.Tensor:
    return torch.ones(*shape, dtype=dtype, device=device)


def test_the_call_that_the_others_spoil() -> None:
    assert call().shape == (1, 4, 4, 5)


CASES = {
    "rank": ({"q": filled(4, 4, 3)}, "q must be a tensor [B, T, Hq, d], not shape [4, 4, 3]"),
    "type": ({"v": [1.0]}, "v must be a tensor [B, T, H, e], not list"),
    "integer keys": (
        {"k": filled(1, 4, 2, 3, dtype=torch.int64)},
        "k has dtype torch.int64; float32, bfloat16, float16 or float64 was expected",
    ),
    "mixed dtypes": (
        {"v": filled(1, 4, 2, 5, dtype=torch.float32)},
        "q, k and v must share a dtype, not torch.float64, torch.float64 and torch.float32",
    ),
    "device": ({"k": filled(1, 4, 2, 3, device="meta")}, "k is on meta, q is on cpu"),
    "gates on another device": ({"log_g": filled(1, 4, 2, device="meta")}, "log_g is on meta, q is on cpu"),
    "batch": ({"k": filled(2, 4, 2, 3)}, "q [1, 4, 4, 3], k [2, 4, 2, 3] and v [1, 4, 2, 5] do not fit together"),
    "length": ({"v": filled(1, 3, 2, 5)}, "v [1, 3, 2, 5] do not fit together"),
    "width": ({"k": filled(1, 4, 2, 4)}, "k [1, 4, 2, 4] and v"),
    "value heads": ({"v": filled(1, 4, 1, 5)}, "v [1, 4, 1, 5] do not fit together"),
    "head counts": (
        {"q": filled(1, 4, 3, 3)},
        "3 query heads cannot share 2 key/value heads; a multiple of them was expected",
    ),
    "no token": ({"q": filled(1, 0, 4, 3)}, "q is empty, [1, 0, 4, 3]"),
    "no sequence": ({"q": filled(0, 4, 4, 3)}, "q is empty, [0, 4, 4, 3]"),
    "gate shape": (
        {"log_g": filled(1, 4, 4)},
        "log_g must be [B, T, H] = [1, 4, 2] in a floating dtype, one gate a key/value head and token, not [1, 4, 4]",
    ),
    "gate dtype": ({"log_g": filled(1, 4, 2, dtype=torch.int64)}, "not [1, 4, 2] in torch.int64"),
    "gate type": ({"log_g": 0.0}, "log_g must be a tensor [B, T, H] or None, not float"),
    "gate above zero": ({"log_g": filled(1, 4, 2) / 4}, "log_g holds a gate above zero (0.25)"),
    "odd power": ({"p": 3}, "p must be an even integer of at least 2 (weights are (q·k)^p), not 3"),
    "fractional power": ({"p": 2.0}, "not 2.0"),
    "zero scale": ({"scale": 0.0}, "scale must be a non-zero number, not 0.0"),
    "scale that is no number": ({"scale": float("nan")}, "scale must be a non-zero number, not nan"),
    "negative chunk": (
        {"chunk_size": -1},
        "chunk_size must be a positive number of tokens, or 0 for attention, not -1",
    ),
    "fractional chunk": ({"chunk_size": 2.5}, "not 2.5"),
    "attention with a state": ({"chunk_size": 0}, "chunk_size=0 asks for the attention form, which has no state"),
    "mask shape": ({"mask": filled(1, 5)}, "mask must be [B, T] = [1, 4], not [1, 5]"),
    "mask device": ({"mask": filled(1, 4, device="meta")}, "mask is on meta, q is on cpu"),
    "borders that are floats": (
        {"cu_seqlens": torch.tensor([0.0, 4.0])},
        "cu_seqlens must be an integer tensor [R + 1] of borders, not [2] in torch.float32",
    ),
    "borders in two dimensions": ({"cu_seqlens": torch.tensor([[0, 4]])}, "not [1, 2] in torch.int64"),
    "one border": ({"cu_seqlens": torch.tensor([4])}, "not [1] in torch.int64"),
    "borders from 1": (
        {"cu_seqlens": torch.tensor([1, 4])},
        "cu_seqlens must rise from 0 to T = 4 without an empty sequence, not [1, 4]",
    ),
    "borders to 3": ({"cu_seqlens": torch.tensor([0, 3])}, "not [0, 3]"),
    "empty sequence": ({"cu_seqlens": torch.tensor([0, 2, 2, 4])}, "not [0, 2, 2, 4]"),
    "falling borders": ({"cu_seqlens": torch.tensor([0, 3, 2, 4])}, "not [0, 3, 2, 4]"),
}


@pytest.mark.parametrize("case", CASES)
def test_arguments(case: str) -> None:
    changes, message = CASES[case]
    with pytest.raises(ArgumentError, match=re.escape(message)):
        call(**changes)


def test_packing_a_batch() -> None:
    problem = random_problem(batch=2, tokens=4)
    with pytest.raises(ArgumentError, match="needs a batch of 1, not 2"):
        power_retention(*problem[:4], cu_seqlens=torch.tensor([0, 4]))


@pytest.mark.parametrize("option", [{"return_state": True}, {"chunk_size": 64}])
def test_states_that_would_be_too_wide(option: dict[str, object]) -> None:
    q = filled(1, 2, 1, 64)
    with pytest.raises(
        ArgumentError, match="p=4 at head width 64 would need a state of width 766,480; the limit is 65,"
    ):
        power_retention(q, q, q, p=4, **option)


def state(**changes: Any) -> PowerState:
    return arguments()["initial_state"]._replace(**changes)


STATE_CASES = {
    "type": ((1, 2), "initial_state must be a PowerState, not tuple"),
    "power": (state(p=4), "The state was made with p=4 and head width 3; this call has p=2 and head width 3"),
    "width": (state(head_width=4), "made with p=2 and head width 4"),
    "rows": (
        PowerState.empty(2, 2, 3, 5, dtype=torch.float64),
        "The state's memory has shape [2, 2, 6, 5]; this call needs [1, 2, 6, 5]",
    ),
    "heads": (PowerState.empty(1, 4, 3, 5), "memory has shape [1, 4, 6, 5]; this call needs [1, 2, 6, 5]"),
    "value width": (PowerState.empty(1, 2, 3, 4), "memory has shape [1, 2, 6, 4]; this call needs [1, 2, 6, 5]"),
    "normalizer": (state(normalizer=filled(1, 2, 5)), "normalizer has shape [1, 2, 5]; this call needs [1, 2, 6]"),
    "device": (PowerState.empty(1, 2, 3, 5, device="meta"), "memory is on meta, the inputs are on cpu"),
    "dtype": (PowerState.empty(1, 2, 3, 5, dtype=torch.int64), "memory has dtype torch.int64; a floating-point state"),
}


@pytest.mark.parametrize("case", STATE_CASES)
def test_states(case: str) -> None:
    wrong, message = STATE_CASES[case]
    with pytest.raises(StateError, match=re.escape(message)):
        call(initial_state=wrong)


def test_one_state_a_packed_sequence() -> None:
    with pytest.raises(StateError, match=re.escape("has shape [1, 2, 6, 5]; this call needs [2, 2, 6, 5]")):
        call(cu_seqlens=torch.tensor([0, 1, 4]))


@pytest.mark.parametrize("case", [name for name in STATE_CASES if name not in ("type", "power")])
def test_states_of_a_step(case: str) -> None:
    wrong, message = STATE_CASES[case]
    given = arguments()
    with pytest.raises(StateError, match=re.escape(message)):
        power_retention_step(*(given[name][:, 0] for name in ("q", "k", "v", "log_g")), wrong)


STEP_CASES = {
    "rank": ({"q": filled(1, 1, 4, 3)}, "q must be a tensor [B, Hq, d], not shape [1, 1, 4, 3]"),
    "heads": ({"q": filled(1, 3, 3)}, "3 query heads cannot share 2 key/value heads"),
    "gates": ({"log_g": filled(1, 4)}, "log_g must be [B, H] = [1, 2]"),
    "gate above zero": ({"log_g": filled(1, 2)}, "log_g holds a gate above zero (1)"),
    "dtype": ({"v": filled(1, 2, 5, dtype=torch.float32)}, "q, k and v must share a dtype"),
}


@pytest.mark.parametrize("case", STEP_CASES)
def test_arguments_of_a_step(case: str) -> None:
    changes, message = STEP_CASES[case]
    given = arguments()
    step = {name: given[name][:, 0] for name in ("q", "k", "v", "log_g")} | changes
    with pytest.raises(ArgumentError, match=re.escape(message)):
        power_retention_step(**step, state=given["initial_state"])


def test_errors_are_value_errors() -> None:
    """Callers who know nothing of this package's errors can still catch them."""
    assert issubclass(ArgumentError, ValueError)
    assert issubclass(StateError, ValueError)
