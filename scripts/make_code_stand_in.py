"""Train a small StarCoder2 on Python's standard library, to take the road from StarCoder2 where no real one is at hand.

    python scripts/make_code_stand_in.py FOLDER [--minutes 6]

FOLDER gets `python.jsonl` (the library's files, tests and generated tables left out), `kept-out/` (every tenth file, which
nothing is trained on), `parent/` (the model and its tokenizer) and `parent.json` (how it was trained).  The model has what
makes StarCoder2 differ from Llama: biases, LayerNorm, a plain MLP, grouped queries, a sliding window, fill-in-the-middle.
It is no code model: it has read a few megabytes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Starcoder2Config, Starcoder2ForCausalLM

from power_retention.files import json_line, write_json
from power_retention.training.fill_in import MARKS, FillIn
from power_retention.training.mixture import read_mixture
from power_retention.training.sharding import make_shards

END = "<|endoftext|>"
LEFT_OUT = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "encodings",
    "site-packages",
    "pydoc_data",
    "turtledemo",
    "__pycache__",
}
SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "sliding_window": 128,
    "rope_theta": 1e4,
    "norm_epsilon": 1e-5,
    "use_bias": True,
    "tie_word_embeddings": True,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
    "attention_dropout": 0.0,
}
BATCH, LENGTH, PEAK = 4, 512, 4e-3


def write_corpus(folder: Path) -> list[str]:
    """The files as documents; every tenth is kept out, in a folder."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in library.rglob("*.py") if not LEFT_OUT & set(path.relative_to(library).parts))
    (folder / "kept-out").mkdir(parents=True, exist_ok=True)
    documents = []
    for number, path in enumerate(files):
        try:
            text = path.read_text(encoding="utf-8")
        except ValueError:
            continue
        if number % 10:
            documents.append(text)
        else:
            (folder / "kept-out" / "_".join(path.relative_to(library).parts)).write_text(text, encoding="utf-8")
    (folder / "python.jsonl").write_text("".join(json_line({"text": text}) for text in documents), encoding="utf-8")
    return documents


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Bytes and merges, with StarCoder's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special, alphabet = [END, *MARKS[0]], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"], special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END)


def train(folder: Path, minutes: float) -> None:
    """Next-token training on the shards for so long: warm-up, then a cosine to nothing."""
    torch.manual_seed(0)
    end = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    model = Starcoder2ForCausalLM(Starcoder2Config(**SHAPE, **end)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.95), weight_decay=0.01)
    mixture, started, step, losses = read_mixture(folder / "shards"), time.monotonic(), 0, []
    while (done := (time.monotonic() - started) / (60 * minutes)) < 1:
        batch = mixture.batch(step, batch=BATCH, length=LENGTH, seed=0)
        logits = model(input_ids=batch.ids, use_cache=False).logits.flatten(0, 1)
        loss = F.cross_entropy(logits, batch.labels.flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = PEAK * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * min(1, done)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        step += 1
        if step % 25 == 0:
            print(f"{done:4.0%}  step {step}  loss {sum(losses[-25:]) / 25:.3f}", file=sys.stderr, flush=True)
    model.eval().save_pretrained(folder / "parent")
    tokens = step * BATCH * LENGTH
    record = {"steps": step, "tokens": tokens, "minutes": minutes, "last_loss": sum(losses[-25:]) / len(losses[-25:])}
    write_json(folder / "parent.json", record | {"shape": SHAPE, "batch": BATCH, "length": LENGTH, "peak_lr": PEAK})


def main() -> None:
    """Make what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=6)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    documents = write_corpus(folder)
    train_tokenizer(documents).save_pretrained(folder / "parent")
    made = make_shards(
        [str(folder / "python.jsonl")], str(folder / "parent"), folder / "shards", fill_in=FillIn(0.5), workers=1
    )
    print(f"{len(documents)} documents, {made.tokens:,} tokens", file=sys.stderr, flush=True)
    train(folder, arguments.minutes)
    print(json.loads((folder / "parent.json").read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
