"""The server's batcher on a GPU: ragged questions at once are answered as one forward over each would.

Run from a clone: ``PYTHONPATH=src python scripts/check_server_on_gpu.py``.
It ends with one line of JSON, and status 1 where something is wrong.
"""

from __future__ import annotations

import json
import sys
import threading

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from power_retention.models import PowerRetentionConfig, PowerRetentionForCausalLM
from power_retention.serving.server.batcher import Batcher, Ended, Event, Grown, Question

CLOSE = 2e-3
LENGTHS = (1, 2, 31, 33, 64, 150, 700, 3000, 5, 90)
VOCABULARY = 512


def main(device: str) -> None:
    """Ask, compare, report."""
    torch.manual_seed(0)
    config = PowerRetentionConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64,
    )  # fmt: skip
    model = PowerRetentionForCausalLM(config).eval().to(device)
    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")))
    batcher = Batcher(model, tokenizer, users=4, piece=128)
    heard: list[list[Event]] = [[] for _ in LENGTHS]
    ended = [threading.Event() for _ in LENGTHS]
    prompts = [torch.randint(1, VOCABULARY, (length,)).tolist() for length in LENGTHS]

    def ear(number: int, event: Event) -> None:
        heard[number].append(event)
        if isinstance(event, Ended):
            ended[number].set()

    for number, prompt in enumerate(prompts):
        batcher.ask(
            Question(prompt, lambda event, n=number: ear(n, event), max_tokens=100, logprobs=0, ignore_eos=True)
        )
    failed = [number for number, end in enumerate(ended) if not end.wait(300)]
    batcher.close()
    errors = [event.error for events in heard for event in events if isinstance(event, Ended) and event.error]
    worst = 0.0
    for prompt, events in zip(prompts, heard, strict=True):
        grown = [event for event in events if isinstance(event, Grown)]
        tokens = [event.token for event in grown]
        with torch.no_grad():
            whole = model(torch.tensor([prompt + tokens], device=device)).logits[0].float().log_softmax(-1).cpu()
        for place, event in enumerate(grown):
            assert event.likelihood is not None
            worst = max(worst, abs(event.likelihood.logprob - whole[len(prompt) - 1 + place, event.token].item()))
    answers = sum(len(events) for events in heard)
    right = not failed and not errors and answers == 101 * len(LENGTHS) and worst < CLOSE
    print(json.dumps({"right": right, "worst": worst, "errors": errors, "device": device, "not_ended": failed}))
    sys.exit(not right)


if __name__ == "__main__":
    main("cuda" if torch.cuda.is_available() else "cpu")
