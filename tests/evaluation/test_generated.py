"""Questions in a file: how they are read, answered in batches and scored, and how they are written."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Starcoder2Config, Starcoder2ForCausalLM

from power_retention.conversion.convert import hard_swap
from power_retention.errors import DataError
from power_retention.evaluation.generated import (
    Free,
    benchmarks_of,
    check_lengths,
    generate_answers,
    read_questions,
    score_answers,
)
from power_retention.evaluation.long.asking import SPARE_TOKENS, Effort
from power_retention.evaluation.long.context import Encoder
from power_retention.evaluation.long.readers import AttentionReader, StateReader
from tiny_models import randomise

SCRIPT = Path(__file__).parents[2] / "scripts" / "write_questions.py"


@pytest.mark.parametrize(
    ("generated", "right"),
    [
        ("Paris", 1),
        (" paris, of course", 1),
        ('\n"Paris"', 1),
        ("the Seine", 1),
        ("Parisian", 0),
        ("It is Paris", 0),
        ("(x + 1) * 2", 1),
        ("x + 1", 0),
        ("", 0),
    ],
)
def test_right_is_what_begins_with_an_answer(generated: str, right: int) -> None:
    assert Free("?", ("Paris", "Seine", "(x + 1)"), ("Paris",)).score(generated) == right


def test_reading(tmp_path: Path) -> None:
    one, two = tmp_path / "capitals.jsonl", tmp_path / "sums.jsonl"
    one.write_text(
        '{"prompt": "France:", "answers": ["Paris"]}\n\n{"prompt": "Peru: ", "answers": ["Lima", "Ciudad"]}\n'
    )
    two.write_text('{"prompt": "1+1=", "answers": ["2"], "guess": 0.1, "task": "arithmetic"}\n')
    questions = read_questions([one, two])
    assert [(q.task, q.guess, q.candidates) for q in questions] == [
        ("capitals", 0.0, (" Paris",)),
        ("capitals", 0.0, ("Ciudad",)),
        ("arithmetic", 0.1, (" 2",)),
    ]
    assert [q.text for q in read_questions([one, two], limit=1)] == ["France:", "1+1="]
    assert [benchmark.name for benchmark in benchmarks_of(questions)] == ["arithmetic", "capitals"]
    scores = score_answers(questions, ["Paris", "Rome", "2"])
    assert scores["capitals"].values.tolist() == [1, 0]
    assert scores["arithmetic"].chance.tolist() == [0.1]


@pytest.mark.parametrize(
    "line",
    ["no JSON", "[]", '{"prompt": "x"}', '{"prompt": "", "answers": ["a"]}', '{"prompt": "x", "answers": []}',
     '{"prompt": "x", "answers": "abc"}', '{"prompt": "x", "answers": [1]}', '{"prompt": "x", "answers": ["a"], "guess": 1}'],
)  # fmt: skip
def test_a_line_of_another_kind_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"prompt": "France:", "answers": ["Paris"]}\n' + line + "\n")
    with pytest.raises(DataError, match=r"questions\.jsonl, line 2: .* was expected"):
        read_questions([path])


def test_no_question_or_no_file(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="No question was found"):
        read_questions([tmp_path / "empty.jsonl"])
    with pytest.raises(DataError, match="cannot be read"):
        read_questions([tmp_path / "none.jsonl"])


def sliding_window_model() -> Any:
    torch.manual_seed(0)
    return randomise(
        Starcoder2ForCausalLM(
            Starcoder2Config(
                vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=256, sliding_window=8, bos_token_id=1, eos_token_id=None,
                pad_token_id=None, tie_word_embeddings=False,
            )
        ).eval()
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["stories", "stories swapped", "sliding window"])
def test_answers_in_a_batch_are_those_that_the_model_gives_alone(kind: str, stories_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories_dir)
    encoder = Encoder(tokenizer)
    if kind == "sliding window":
        model = sliding_window_model()
    else:
        model = AutoModelForCausalLM.from_pretrained(stories_dir, dtype=torch.float32).eval()
    if kind == "stories swapped":
        model = hard_swap(model).eval()
    reader = StateReader(model) if kind == "stories swapped" else AttentionReader(model)
    prompts = [
        "Once upon a time, there was a",
        "Tom and Lily went",
        "The dog was very happy because it",
        "One day, a cat",
    ]
    questions = [Free(prompt, ("x",), (" park",)) for prompt in prompts]
    got = generate_answers(reader, questions, encoder, Effort(1 << 12, 1 << 28))
    for prompt, answer in zip(prompts, got, strict=True):
        ids = torch.tensor([encoder.start + encoder("\n") + encoder(prompt)])
        new = len(encoder.after(prompt, " park")) + SPARE_TOKENS
        options: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert answer == tokenizer.decode(alone[0, ids.shape[1] :], skip_special_tokens=True)
    assert len(set(got)) > 1


def test_prompts_that_leave_no_room_are_refused(stories_dir: Path) -> None:
    encoder = Encoder(AutoTokenizer.from_pretrained(stories_dir))
    short, long = (Free("word " * count, ("x",), ("x",)) for count in (4, 400))
    check_lengths([short], encoder, 512)
    with pytest.raises(DataError, match="1 of 2 prompts are longer than the 512 positions"):
        check_lengths([short, long], encoder, 512)


def write_questions(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> list[dict[str, Any]]:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    return [json.loads(line) for line in Path(str(arguments[2])).read_text().splitlines()]


def test_identifiers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree, out = tmp_path / "tree", tmp_path / "out.jsonl"
    tree.mkdir()
    names = [f"value_{letter}" for letter in "abcdefghij"]
    whole = "".join(f"{name} = {i}\n" for i, name in enumerate(names)) + "total = value_c + value_a\n"
    (tree / "good.py").write_text(whole)
    (tree / "few.py").write_text("alpha = 1\nprint(alpha)\n")
    (tree / "bad.py").write_text("def (:\n")
    (question,) = write_questions(monkeypatch, "identifiers", tree, out)
    assert question["task"] == "identifiers"
    assert question["answers"][0] in ("value_a", "value_c")
    assert whole.startswith(f"{question['prompt']} {question['answers'][0]}")
    assert question["guess"] == round(1 / (11), 4)
    assert [q.text for q in read_questions([out])] == [question["prompt"]]
    first = out.read_bytes()
    write_questions(monkeypatch, "identifiers", tree, out)
    assert out.read_bytes() == first


def test_brackets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree, out = tmp_path / "tree", tmp_path / "out.jsonl"
    tree.mkdir()
    whole = "x = (1, [2, 3], {4: ')'}, f(), (\n))\n"  # two close nothing but space, one stands in a string
    (tree / "a.py").write_text(whole)
    (tree / "none.py").write_text("x = 1\n")
    questions = write_questions(monkeypatch, "brackets", tree, out, "--each", 9)
    closed = {(question["prompt"][-3:], *question["answers"]) for question in questions}
    assert closed == {(", 3", "]"), ("')'", "}"), ("(\n)", ")")}
    assert all(whole.startswith(question["prompt"] + question["answers"][0]) for question in questions)
    assert len(write_questions(monkeypatch, "brackets", tree, out)) == 1


def test_squad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [{"question": f"Who is {n}?", "answers": [{"text": n}, {"text": n}]} for n in ("Ann", "Bob", "Cid")]
    hopeless = [{"question": "Why?", "answers": []}] * 3
    paragraphs = [{"context": "Ann, Bob, Cid.", "qas": asked}, {"context": "Nothing.", "qas": hopeless}]
    source = tmp_path / "squad.json"
    source.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    (question,) = write_questions(monkeypatch, "squad", source, tmp_path / "out.jsonl")
    (answer,) = question["answers"]
    assert question["prompt"].startswith("Ann, Bob, Cid.\nQuestion: Who is ")
    assert question["prompt"].endswith(f"Question: Who is {answer}?\nAnswer:")
    assert question["prompt"].count("Answer:") == 3
