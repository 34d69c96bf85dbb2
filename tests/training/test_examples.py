"""Examples for fine-tuning: what the assistant says is learned, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from power_retention.errors import DataError
from power_retention.training.examples import Example, dump_examples, fingerprint_examples, read_examples

PLAIN = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m.role }}] {% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
FORGETFUL = "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
CHAT = [
    {"role": "user", "content": "A cat?"},
    {"role": "assistant", "content": "A red cat."},
    {"role": "user", "content": "And a dog?"},
    {"role": "assistant", "content": "No dog."},
]


@pytest.fixture(scope="module")
def tokenizer(stories_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(stories_dir)


def written(tmp_path: Path, *records: Any) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def learned_text(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.decode(example.ids[example.learned].tolist())


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_only_what_the_assistant_says(template: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """By a template that marks it and by one that does not, the end of each turn included."""
    path = written(tmp_path, {"messages": CHAT})
    (example,) = read_examples([path], tokenizer, chat_template=template)
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False, chat_template=template)
    assert example.ids.tolist() == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert learned_text(example, tokenizer).split(tokenizer.eos_token) == ["A red cat.", "No dog.", ""]
    assert int(np.diff(example.learned.astype(int)).clip(0).sum()) == 2


def test_a_prompt_and_its_completion(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = written(tmp_path, {"prompt": "Once upon", "completion": " a time"}, {"text": "A cat."})
    completed, text = read_examples([path], tokenizer)
    count = len(tokenizer("Once upon")["input_ids"])
    assert completed.learned.tolist() == [False] * count + [True] * (len(completed) - count)
    assert learned_text(completed, tokenizer).endswith(f"a time{tokenizer.eos_token}")
    assert text.learned.all()
    assert text.ids[-1] == tokenizer.eos_token_id
    assert fingerprint_examples([completed, text]) != fingerprint_examples([text, completed])
    shown = [json.loads(line) for line in dump_examples([completed], tokenizer)]
    assert shown[0].count("⟦") == 1
    assert shown[0].endswith(f"{tokenizer.eos_token}⟧")


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    ("prompt", "completion", "learned"),
    [("x\n", "y", "y"), ("Once upon", " a time", "▁a▁time"), ("x ", "y", "▁y"), ("", "y", "▁y"), ("日", "本", "本")],
)
def test_both_are_tokenized_as_one_text(
    fast: bool,
    prompt: str,
    completion: str,
    learned: str,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tokenizer that begins each text with a space teaches none between them, and no half of a token is learned."""
    monkeypatch.setattr(type(tokenizer), "is_fast", fast)
    (example,) = read_examples([written(tmp_path, {"prompt": prompt, "completion": completion})], tokenizer)
    assert example.ids.tolist() == [*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id]
    pieces = tokenizer.convert_ids_to_tokens(example.ids[example.learned].tolist()[:-1])
    wanted = tokenizer.backend_tokenizer.decoder.decode(["x", learned])[1:]
    assert tokenizer.backend_tokenizer.decoder.decode(["x", *pieces])[1:] == wanted


def test_one_end_is_enough(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """For tokenizers that end every text themselves, and for data that do."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    ending = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    path = written(tmp_path, {"prompt": "x", "completion": " y"}, {"prompt": "x", "completion": ""}, {"text": "y"})
    for example, count in zip(read_examples([path], ending), (2, 1, None), strict=True):
        assert example.ids.tolist().count(2) == 1
        assert example.ids.tolist()[:: len(example) - 1] == [1, 2]
        assert example.learned.all() if count is None else example.learned.sum() == count
    path = written(tmp_path, {"prompt": "x", "completion": f" y{tokenizer.eos_token}"})
    (example,) = read_examples([path], tokenizer)
    assert example.ids.tolist().count(tokenizer.eos_token_id) == 1


def test_what_is_shown_is_what_is_learned(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    records = [("x\n", "y"), ("Once upon", " a time"), ("x ", "y"), ("日", "本")]
    path = written(tmp_path, *({"prompt": prompt, "completion": completion} for prompt, completion in records))
    shown = [json.loads(line) for line in dump_examples(read_examples([path], tokenizer), tokenizer)]
    assert shown == ["x\n⟦y<s>⟧", "Once upon⟦ a time<s>⟧", "x⟦ y<s>⟧", "日⟦本<s>⟧"]


def test_halves_of_surrogate_pairs_are_replaced(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "x \ud800 y"}, {"role": "assistant", "content": "\udc00 z"}]
    path = written(tmp_path, {"messages": chat}, {"prompt": "x \ud800", "completion": " \udc00 z"})
    for example in read_examples([path], tokenizer, chat_template=PLAIN):
        assert learned_text(example, tokenizer).strip() == f"? z{tokenizer.eos_token}"


@pytest.mark.parametrize(
    ("record", "template", "message"),
    [
        ({"messages": CHAT}, None, "has no chat template"),
        ({"messages": CHAT}, FORGETFUL, "writes earlier messages differently"),
        ({"messages": CHAT}, "{{ messages[9].content }}", "does not fit the chat template"),
        ({"messages": [{"content": "x"}]}, PLAIN, "no list of objects with a role"),
        ({"messages": CHAT[:1]}, PLAIN, "nothing that a model could learn"),
        ({"prompt": "x"}, None, "no field 'completion'"),
        ({"body": "x"}, None, "has the fields 'body'; messages"),
        (["x"], None, "holds a list; an object"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(
    record: Any, template: str | None, message: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        read_examples([written(tmp_path, record)], tokenizer, chat_template=template)
