"""Let a model write what another is to learn from it: conversations, or questions about documents with their answers.

    python scripts/write_samples.py TEACHER chat.jsonl --documents 6000
    python scripts/write_samples.py TEACHER questions.jsonl --about wikipedia.jsonl --documents 12000

Conversations begin with nothing but the chat template: the model writes the user's turn as well as its own (as in Magpie,
Xu et al. 2024), so what is asked is what it was taught to be asked.  With --about, a document is some of the file's
documents and three questions about one of them; those that `retrain` holds out by default are left out here too.
On a CPU --batch 16 suits better.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from power_retention.conversion.source import open_source
from power_retention.files import json_line, replacement
from power_retention.training.text import read_documents, split_held_out

PARAGRAPH = (40, 224)
"""Tokens of a document that is asked about, at least and at most."""
QUESTIONS = 3
"""About the same document."""
UNLIKELY = 0.05
"""Tokens less likely than this share of the likeliest are never drawn (min-p)."""
LOOK_EVERY = 16
"""Steps between looks at whether all texts have ended."""


class Writer:
    """Samples continuations of many prompts at once: keys and values stay in place, and a GPU's step is recorded."""

    def __init__(self, model: PreTrainedModel, batch: int, stop: int) -> None:
        self.model, self.batch, self.stop = model.eval(), batch, stop
        ALL_ATTENTION_FUNCTIONS.register("kept_in_place", self._attend)
        model.config._attn_implementation = "kept_in_place"

    @torch.inference_mode()
    def write(self, prompts: list[list[int]], length: int, temperature: float, doing: str) -> list[list[int]]:
        """Up to ``length`` tokens after each prompt; a text that ended has ``stop`` as its last token."""
        self._reserve(max(map(len, prompts)), length, temperature)
        written: list[list[int]] = []
        for begin in track(range(0, len(prompts), self.batch), doing):
            some = prompts[begin : begin + self.batch]
            written += self._continue(some + some[:1] * (self.batch - len(some)), length)[: len(some)]
        return written

    def _reserve(self, width: int, length: int, temperature: float) -> None:
        self.width, self.room, self.temperature = width, width + length, temperature
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        device = self.model.device
        self.token = torch.zeros(self.batch, 1, dtype=torch.long, device=device)
        self.position = torch.zeros_like(self.token)
        self.place = torch.zeros(1, dtype=torch.long, device=device)
        self.hidden = torch.zeros(self.batch, 1, 1, self.room, dtype=self.model.dtype, device=device)
        self.step = self._next
        if device.type == "cuda":
            self.step = self._recorded()

    def _recorded(self) -> Any:
        """The step as a CUDA graph; what the steps before it wrote is written over."""
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._next()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._next()
        return graph.replay

    def _next(self) -> None:
        """Read the last token, draw the next."""
        self.hidden.index_fill_(3, self.place, 0.0)
        self.at = self.place
        self.token.copy_(self._draw(self.token, self.position, self.hidden))
        self.place += 1
        self.position += 1

    def _draw(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        read = self.model(tokens, position_ids=positions, attention_mask=mask, use_cache=False, logits_to_keep=1)
        likely = (read.logits[:, -1].float() / self.temperature).softmax(-1)
        likely = likely.masked_fill(likely < UNLIKELY * likely.amax(-1, keepdim=True), 0.0)
        drawn: Tensor = (likely / torch.empty_like(likely).exponential_()).argmax(-1, keepdim=True)
        return drawn

    def _continue(self, prompts: list[list[int]], length: int) -> list[list[int]]:
        device, lowest = self.model.device, torch.finfo(self.model.dtype).min
        padding = torch.tensor([self.width - len(prompt) for prompt in prompts], device=device)[:, None]
        tokens = torch.tensor([[self.stop] * (self.width - len(p)) + p for p in prompts], device=device)
        columns = torch.arange(self.room, device=device)
        self.at = columns[: self.width]
        unseen = (columns > self.at[:, None]) | (columns < padding[:, :, None])
        mask = torch.zeros(unseen.shape, dtype=self.model.dtype, device=device).masked_fill_(unseen, lowest)
        self.token.copy_(self._draw(tokens, (self.at - padding).clamp_min(0), mask[:, None]))
        self.hidden.copy_(mask[:, None, -1:])
        self.position.copy_(self.width - padding)
        self.place.fill_(self.width)
        drawn = [self.token.clone()]
        for count in range(1, length):
            self.step()
            drawn.append(self.token.clone())
            if count % LOOK_EVERY == 0 and (torch.cat(drawn, 1) == self.stop).any(1).all():
                break
        return [upto(row, self.stop) for row in torch.cat(drawn, 1).tolist()]

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        """Attention over all that was written; each key is read once for all heads that share it."""
        if module.layer_idx not in self.kept:
            room = (*key.shape[:2], self.room, key.shape[3])
            self.kept[module.layer_idx] = key.new_zeros(room), value.new_zeros(room)
        keys, values = self.kept[module.layer_idx]
        keys.index_copy_(2, self.at, key)
        values.index_copy_(2, self.at, value)
        rows, heads, length, width = query.shape
        scores = (query * scaling).reshape(rows, keys.shape[1], -1, width) @ keys.mT
        weights = (scores.view(rows, heads, length, -1) + mask).softmax(-1, dtype=torch.float32).to(values.dtype)
        read = weights.view(rows, keys.shape[1], -1, self.room) @ values
        return read.view(rows, heads, length, width).transpose(1, 2), None


def upto(row: list[int], stop: int) -> list[int]:
    """A row with its first ``stop``, without what follows it."""
    return row[: row.index(stop) + 1] if stop in row else row


def template_parts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What a chat template puts before the user's words, and between them and the answer."""
    words = "the user's words"
    message = [{"role": "user", "content": words}]
    whole = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    before, _, after = whole.partition(words)
    return before, after


def conversations(writer: Writer, tokenizer: PreTrainedTokenizerBase, count: int) -> Iterator[str]:
    """Questions that end, and their answers, as the chat template sets them."""
    before, after = template_parts(tokenizer)
    first = tokenizer.encode(before, add_special_tokens=False)
    asked = writer.write([first] * count, 128, 1.0, "asking")
    said = [tokenizer.decode(tokens[:-1]).strip() for tokens in asked if tokens[-1] == writer.stop]
    prompts = [before + words + after for words in said if len(words) > 8]
    answers = writer.write([tokenizer.encode(p, add_special_tokens=False) for p in prompts], 384, 0.8, "answering")
    for prompt, answer in zip(prompts, answers, strict=True):
        yield prompt + tokenizer.decode(answer)


def readings(
    writer: Writer, tokenizer: PreTrainedTokenizerBase, documents: list[str], count: int, rng: random.Random
) -> Iterator[str]:
    """Some documents, and then three questions about one of them with their answers."""
    sized = [text for text in documents if PARAGRAPH[0] <= len(tokenizer.encode(text)) <= PARAGRAPH[1]]
    if not sized:
        raise SystemExit("none of the documents has {} to {} tokens: nothing to ask about".format(*PARAGRAPH))
    chosen = [rng.choice(sized) for _ in range(count)]
    begun = [text + "\n\nQuestion:" for text in chosen for _ in range(QUESTIONS)]
    written = writer.write([tokenizer.encode(text) for text in begun], 40, 0.7, "asking")
    questions = [" " + one_line(tokenizer.decode(tokens).partition("?")[0]) + "?" for tokens in written]
    asked = [f"{text}{question}\nAnswer:" for text, question in zip(begun, questions, strict=True)]
    written = writer.write([tokenizer.encode(text) for text in asked], 32, 0.3, "answering")
    answers = [one_line(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in written]
    for place, text in enumerate(chosen):
        theirs = slice(QUESTIONS * place, QUESTIONS * (place + 1))
        pairs = zip(questions[theirs], answers[theirs], strict=True)
        told = dict.fromkeys(f"Question:{q}\nAnswer: {a}" for q, a in pairs if len(q.split()) > 3 and a)
        if told:
            texts = [text, *rng.choices(sized, k=rng.choice((0, 0, 1, 3, 6)))]
            rng.shuffle(texts)
            yield "\n\n".join([*texts, "\n".join(told)])


def one_line(text: str) -> str:
    """The first line of a text."""
    return text.strip().partition("\n")[0].rstrip()


def main() -> None:
    """Write a file of documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", help="a directory, a GGUF file or a name on the hub")
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--about", type=Path, help="JSONL of documents to ask about; without it conversations are written"
    )
    parser.add_argument("--documents", type=int, default=6000, help="begun; what comes to nothing is dropped")
    parser.add_argument("--batch", type=int, default=1536)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    source = open_source(arguments.teacher, dtype=torch.bfloat16)
    tokenizer, model = source.tokenizer, source.model.to(arguments.device)
    writer = Writer(model, min(arguments.batch, arguments.documents), tokenizer.eos_token_id)
    if arguments.about:
        documents = split_held_out(read_documents([arguments.about]))[0]
        texts = readings(writer, tokenizer, documents, arguments.documents, random.Random(arguments.seed))
    else:
        texts = conversations(writer, tokenizer, arguments.documents)
    with replacement(arguments.out) as temporary, temporary.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json_line({"text": text}))


if __name__ == "__main__":
    main()
