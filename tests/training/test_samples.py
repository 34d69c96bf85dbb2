"""What a model writes for another to learn from."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from power_retention.conversion.source import Source, open_source
from power_retention.training.text import split_held_out

SCRIPT = Path(__file__).parents[2] / "scripts" / "write_samples.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_samples", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def stories(stories_dir: Path) -> Source:
    return open_source(stories_dir)


def test_the_likeliest_is_what_transformers_writes(
    script: ModuleType, stories: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of several lengths, three at once, one of them alone in its batch; only the likeliest tokens are drawn."""
    starts = ("Once upon a time", "One", "Lily and Ben went to the park. They", "Tom")
    prompts = [stories.tokenizer.encode(text) for text in starts]
    wanted = []
    for prompt in prompts:
        read = torch.tensor([prompt])
        whole = stories.model.generate(
            read, attention_mask=torch.ones_like(read), max_new_tokens=40, do_sample=False, pad_token_id=0
        )
        wanted.append(whole[0, len(prompt) :].tolist())
    monkeypatch.setattr(script, "UNLIKELY", 1.0)
    stop = wanted[0][25]  # some token that comes up stands for the end
    written = script.Writer(stories.model, 3, stop).write(prompts, 40, 1.0, "writing")
    assert written == [script.upto(row, stop) for row in wanted]
    assert len({len(row) for row in written}) > 1


def test_draws_follow_the_temperature(script: ModuleType, stories: Source) -> None:
    torch.manual_seed(0)
    writer = script.Writer(stories.model, 64, 2)
    prompts = [stories.tokenizer.encode("Once upon a time, there was a")] * 64
    cold, warm = (len({tuple(row) for row in writer.write(prompts, 8, heat, "writing")}) for heat in (0.1, 1.5))
    assert cold < warm / 2


def test_conversations_are_set_as_the_template_sets_them(script: ModuleType, stories: Source) -> None:
    tokenizer = stories.tokenizer
    said = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    tokenizer.chat_template = said + "{% if add_generation_prompt %}[tells]{% endif %}"
    torch.manual_seed(0)
    full_stop = tokenizer.encode("It ended.")[-1]
    writer = script.Writer(stories.model, 8, full_stop)
    told = list(script.conversations(writer, tokenizer, 8))
    assert told
    for text in told:
        asked, answer = text.removeprefix("[user] ").split("\n[tells]")
        assert len(asked) > 8
        assert answer


def test_questions_follow_what_is_not_held_out(
    script: ModuleType, stories_dir: Path, stories_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of stories asks nothing, so what it is made to write here is put into its mouth."""
    documents = [json.loads(line)["text"] for line in stories_text.read_text().splitlines()][:40]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    monkeypatch.setattr(script, "PARAGRAPH", (40, 500))
    asked: list[list[int]] = []

    def write(self: object, prompts: list[list[int]], length: int, temperature: float, doing: str) -> list[list[int]]:
        asked.extend(prompts)
        said = (
            [" What did they see? Yes", " Who was there at all?\nNo"]
            if doing == "asking"
            else ["\n A dog. \nQuestion", ""]
        )
        return [tokenizer.encode(said[place % 2]) for place in range(len(prompts))]

    tokenizer = open_source(stories_dir).tokenizer
    monkeypatch.setattr(script.Writer, "write", write)
    out = tmp_path / "questions.jsonl"
    monkeypatch.setattr(
        sys, "argv", [str(SCRIPT), str(stories_dir), str(out), "--about", str(corpus), "--documents", "6"]
    )
    script.main()
    texts = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    shown, held = split_held_out(documents)
    assert held
    assert len(texts) == 6
    for text in texts:
        assert text.endswith("\n\nQuestion: What did they see?\nAnswer: A dog.")
        assert any(document in text for document in shown)
        assert not any(document in text for document in held)
    assert "Question: What did they see?\nAnswer:" in tokenizer.decode(asked[-2])


def test_nothing_to_ask_about(script: ModuleType, stories: Source) -> None:
    writer = script.Writer(stories.model, 1, 2)
    with pytest.raises(SystemExit, match="none of the documents has 40 to 224 tokens"):
        list(script.readings(writer, stories.tokenizer, ["short"], 1, random.Random(0)))
