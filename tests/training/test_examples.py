"""Examples for fine-tuning: what the assistant says is learned, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

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
