"""``power-retention sft``: conversations in, a model that learned them out; stopped and resumed, the same one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_cli import Here, here, interrupt_after  # noqa: F401 (a fixture)
from transformers import AutoModelForCausalLM, AutoTokenizer

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
CURRICULUM = """
data = ["chats.jsonl"]
[[phase]]
steps = 3
length = 512
rows = 2
segment = 128
[[phase]]
name = "stream"
steps = 3
length = 256
segment = 128
bptt = "truncated"
carry = true
"""


@pytest.fixture(scope="module")
def model(stories_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K with its mixers swapped, uncalibrated."""
    from power_retention.conversion.source import open_source
    from power_retention.conversion.swap import swap_attention

    folder = tmp_path_factory.mktemp("sft") / "model"
    source = open_source(stories_dir)
    swap_attention(source.model).save_pretrained(folder)
    source.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data(stories_text: Path, tmp_path: Path) -> Path:
    texts = [json.loads(line)["text"] for line in stories_text.read_text().splitlines()[:40]]
    chats = [[{"role": "user", "content": x[:40]}, {"role": "assistant", "content": x[40:]}] for x in texts]
    lines = [json.dumps({"messages": chat}) + "\n" for chat in chats]
    (tmp_path / "chats.jsonl").write_text("".join(lines))
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    (tmp_path / "curriculum.toml").write_text(CURRICULUM)
    return tmp_path


def test_a_curriculum_stopped_and_resumed(here: Here, model: Path, data: Path) -> None:  # noqa: F811
    arguments = (
        "--data",
        data / "curriculum.toml",
        "--chat-template",
        data / "template.jinja",
        "--precision",
        "float32",
    )
    options = (*arguments, "--device", "cpu", "--seed", "1", "--lr", "1e-3")
    done = here("sft", model, data / "straight", *options, "--json")
    assert done.code == 0, done.err
    assert [phase["length"] for phase in done.json["recipe"]["phases"]] == [512, 256]
    records = [json.loads(line) for line in (data / "straight" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["stage"] for record in records] == ["phase 1"] * 3 + ["stream"] * 3
    assert done.json["last_step"] == records[-1]
    assert all(record["tokens_read"] == 256 for record in records[3:])
    interrupted = interrupt_after(2, data / "out" / "run" / "metrics.jsonl", "sft", model, data / "out", *options)
    if interrupted.code == 75:  # else it was faster than we
        assert here.refusal("sft", model, data / "out", *options).startswith(f"{data / 'out'} holds an unfinished run")
        resumed = here("sft", model, data / "out", *options, "--resume")
        assert resumed.code == 0, resumed.err
    wanted, got = (load_file(data / name / "model.safetensors") for name in ("straight", "out"))
    assert {name: x.equal(wanted[name]) for name, x in got.items()} == dict.fromkeys(wanted, True)
    assert AutoTokenizer.from_pretrained(data / "out").chat_template == TEMPLATE


def test_resumed_with_what_it_was_begun_with(here: Here, model: Path, data: Path) -> None:  # noqa: F811
    """Options and phases given anew are never silently ignored; the run, its settings written, has yet to take a step."""
    from power_retention.training.tuning import TuningFolder, TuningPhase, TuningRecipe, read_curriculum

    common = ("--chat-template", data / "template.jinja", "--device", "cpu", "--resume")
    folder, chats = TuningFolder(data / "out" / "run"), ("--data", data / "chats.jsonl", *common)
    folder.begin_tuning(TuningRecipe((TuningPhase(1, 512, name="tuning"),), lr=1e-6, seed=3), {})
    for name, begun, other, said in (
        ("--lr", "1e-06", "5e-3", "0.005"),
        ("--seed", "3", "0", "0"),
        ("--lora", "0", "2", "2"),
        ("--precision", "float32", "bfloat16", "bfloat16"),
        ("--steps", "1", "7", "7"),
        ("--length", "512", "4k", "4096"),
        ("--bptt", "exact", "truncated", "truncated"),
    ):
        sentence = f"The run was begun with {name} {begun}, not {said}: leave the option out, or choose a new folder."
        assert here.refusal("sft", model, data / "out", *chats, name, other) == sentence
    assert "--carry False, not True" in here.refusal("sft", model, data / "out", *chats, "--carry")
    same = ("--lr", "0.000001", "--seed", "3", "--length", "512", "--precision", "auto")
    done = here("sft", model, data / "out", *chats, *same)
    assert done.code == 0, done.err

    folder = TuningFolder(data / "phases" / "run")
    phases = read_curriculum(data / "curriculum.toml")[1]
    folder.begin_tuning(TuningRecipe(tuple(phases)), {})
    resumed = ("sft", model, data / "phases", "--data", data / "curriculum.toml", *common)
    (data / "curriculum.toml").write_text(CURRICULUM.replace("rows = 2", "rows = 4"))
    assert "begun with rows of phase 1 2, not 4: give the curriculum" in here.refusal(*resumed)
    (data / "curriculum.toml").write_text(CURRICULUM + "[[phase]]\nsteps = 1\nlength = 512\n")
    assert "phases in number 2, not 3" in here.refusal(*resumed)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_adapters_are_kept_and_merged(here: Here, model: Path, data: Path) -> None:  # noqa: F811
    peft = pytest.importorskip("peft", reason="pip install power-retention[neighbours]")
    template = ("--chat-template", data / "template.jinja")
    options = (
        "--data",
        data / "chats.jsonl",
        "--steps",
        "2",
        "--length",
        "512",
        "--precision",
        "float32",
        "--lora",
        "2",
    )
    done = here("sft", model, data / "out", *options, *template, "--lr", "1e-2", "--activation-checkpointing")
    assert done.code == 0, done.err
    ids = torch.arange(3, 40)[None]
    merged = AutoModelForCausalLM.from_pretrained(data / "out").eval()
    adapted = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model), data / "out" / "adapter"
    ).eval()
    before = AutoModelForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():
        logits = [each(ids, use_cache=False).logits for each in (merged, adapted, before)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-3)
    assert (logits[0] - logits[2]).abs().max() > 0.01


def test_a_look_at_what_is_learned(here: Here, model: Path, data: Path) -> None:  # noqa: F811
    options = ("--data", data / "chats.jsonl", "--chat-template", data / "template.jinja", "--show", "2")
    shown = [json.loads(line) for line in here("sft", model, data / "out", *options).out.splitlines()]
    assert len(shown) == 2
    assert all(text.startswith("[user]") and text.count("⟦") == 1 for text in shown)
    assert all(text.split("⟦")[0].rstrip().endswith("[assistant]") for text in shown)
    assert not (data / "out").exists()


def test_help_and_refusals(here: Here, model: Path, data: Path) -> None:  # noqa: F811
    assert "curriculum.toml" in here("sft", "--help").out
    chats = ("--data", data / "chats.jsonl")
    assert "has no chat template" in here.refusal("sft", model, data / "out", *chats)
    chats = (*chats, "--chat-template", data / "template.jinja", "--device", "cpu")
    assert "the shortest has" in here.refusal(
        "sft", model, data / "out", *chats, "--length", "8", "--precision", "float32"
    )
    assert "bptt of a phase must be one of" in here.refusal("sft", model, data / "out", *chats, "--bptt", "none")
    assert "rank of adapters must be" in here.refusal("sft", model, data / "out", *chats, "--lora", "-4")
    assert "does not exist" in here.refusal("sft", model, data / "out", "--data", data / "no.jsonl")
    assert "cannot be read" in here.refusal(
        "sft", model, data / "out", *chats[:2], "--chat-template", data / "no.jinja"
    )
