"""A teacher reads each document by itself, also through a sliding window, exactly as the library's own attention would."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from power_retention.training.parallel import Trunk
from power_retention.training.teaching import prepare_teacher, read_documents


@pytest.mark.parametrize("window", [None, 7, 64])
@pytest.mark.parametrize("borders", [None, [0, 1, 18, 40, 55, 80]])
def test_each_document_by_itself(window: int | None, borders: list[int] | None) -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=window,
    )  # fmt: skip
    plain = MistralForCausalLM(config).double().eval()
    teacher = copy.deepcopy(plain)
    prepare_teacher(teacher, torch.float64)
    ids = torch.randint(0, 50, (2, 40))
    cu_seqlens = None if borders is None else torch.tensor(borders, dtype=torch.int32)
    pieces = [0, 40, 80] if borders is None else borders
    positions = torch.cat([torch.arange(end - start) for start, end in pairwise(pieces)]).view(2, 40)
    with torch.no_grad():
        got = read_documents(Trunk(teacher), ids, positions, cu_seqlens).flatten(0, 1)
        wanted: list[Tensor] = [
            plain.model(ids.flatten()[None, start:end], use_cache=False).last_hidden_state[0]
            for start, end in pairwise(pieces)
        ]
    torch.testing.assert_close(got, torch.cat(wanted), rtol=1e-6, atol=1e-6)
