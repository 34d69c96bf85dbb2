"""Fine-tuning: steps read what they should, documents go on across steps, and a resumed run ends where a straight one does."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from power_retention.errors import ArgumentError, CheckpointError, DataError, RunInterrupted
from power_retention.training.examples import Example
from power_retention.training.run import execute
from power_retention.training.segments import backward_in_segments
from power_retention.training.tuning import (
    Span,
    Tuning,
    TuningFolder,
    TuningPhase,
    TuningRecipe,
    plan_phase,
    read_curriculum,
    with_adapters,
)
from tiny_models import VOCABULARY, tiny_model


def example(length: int, seed: int, prompt: int = 3) -> Example:
    ids = np.random.default_rng(seed).integers(1, VOCABULARY, length).astype(np.int32)
    return Example(ids, np.arange(length) >= prompt)


EXAMPLES = [example(length, seed) for seed, length in enumerate([20, 33, 50, 9, 130, 14])]
CURRICULUM = TuningRecipe(
    (
        TuningPhase(2, 32, rows=3, segment=16, name="short"),
        TuningPhase(4, 40, segment=16, bptt="truncated", carry=True, name="long"),
        TuningPhase(2, 40, segment=16, bptt="state_passing", name="passing"),
    ),
    lr=1e-2,
)


def rows(tuning: Tuning) -> list[list[Span]]:
    return [tuning.row(step) for step in range(tuning.recipe.steps)]


def weights(tuning: Tuning) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in tuning.student.named_parameters()}


class TestPlan:
    LENGTHS = (20, 33, 50, 9, 130, 14)

    def test_whole_documents_packed(self) -> None:
        phase = TuningPhase(30, 50, rows=2)
        plan = plan_phase(self.LENGTHS, phase, seed=0)
        assert plan == plan_phase(self.LENGTHS, phase, seed=0)
        assert plan != plan_phase(self.LENGTHS, phase, seed=1)
        assert all(sum(span.stop for span in row) <= 100 for row in plan)
        spans = [span for row in plan for span in row]
        assert all((span.start, span.stop) == (0, self.LENGTHS[span.example]) for span in spans)
        counts = np.bincount([span.example for span in spans])
        assert counts[4] == 0  # longer than the phase reads
        assert counts[[0, 1, 2, 3, 5]].max() - counts[[0, 1, 2, 3, 5]].min() <= 1

    def test_a_stream_of_documents_of_any_length(self) -> None:
        plan = plan_phase(self.LENGTHS, TuningPhase(20, 40, carry=True), seed=0)
        assert all(sum(span.stop - span.start for span in row) == 40 for row in plan)
        stream = [(span.example, t) for row in plan for span in row for t in range(span.start, span.stop)]
        documents = [t for t, (_, place) in enumerate(stream) if place == 0]
        for start in documents[:-1]:
            length = self.LENGTHS[stream[start][0]]
            assert stream[start : start + length] == [(stream[start][0], t) for t in range(length)]

    def test_any_seed(self) -> None:
        phase = TuningPhase(30, 50)
        plans = [plan_phase(self.LENGTHS, phase, seed=seed) for seed in (-2, -1, 0, 1)]
        assert all(one not in plans[:number] for number, one in enumerate(plans))

    def test_nothing_short_enough(self) -> None:
        with pytest.raises(DataError, match="up to 8 tokens, and the shortest has 9"):
            plan_phase(self.LENGTHS, TuningPhase(1, 8), seed=0)


class TestCurriculum:
    def test_a_file(self, tmp_path: Path) -> None:
        path = tmp_path / "curriculum.toml"
        path.write_text(
            'data = ["chats.jsonl"]\n[[phase]]\nsteps = 3\nlength = 64\nrows = 2\n'
            '[[phase]]\nname = "books"\nsteps = 2\nlength = 512\nsegment = 128\ncarry = true\nbptt = "truncated"\n'
        )
        files, phases = read_curriculum(path)
        assert files == [tmp_path / "chats.jsonl"]
        assert phases[0] == TuningPhase(3, 64, 2, name="phase 1")
        assert phases[1] == TuningPhase(2, 512, 1, 128, "truncated", True, "books")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("data = [", "is not TOML"),
            ('data = ["x"]\nphases = []', "'data', 'phases'; data and"),
            ('data = "x"\nphase = []', "a list of files or folders"),
            ('data = ["x"]\n[[phase]]\nsteps = 3', "phase 1, lacks length"),
            (
                'data = ["x"]\n[[phase]]\nsteps = 3\nlength = 0',
                "length of a phase must be a positive whole number, not 0",
            ),
            ('data = ["x"]\n[[phase]]\nsteps = 3\nlength = 8\nwarm = 1', "has 'warm'; it may have steps"),
            ('data = ["x"]\n[[phase]]\nsteps = 3\nlength = 8\nbptt = "all"', "must be one of exact, truncated"),
            ('data = ["x"]\nphase = [1]', "phase 1, is 1; a table with steps"),
            ('data = ["x"]\nphase = []', "has no phase; at least one"),
            ('data = ["x"]\n[[phase]]\nsteps = 3\nlength = 8\ncarry = "no"', "carry of a phase must be true or false"),
            ('data = ["x"]\n[[phase]]\nsteps = 3\nlength = 8\nname = 1', "name of a phase must be a text, not 1"),
            ('data = ["x"]\n[[phase]]\nsteps = 3.0\nlength = 8', "steps of a phase must be a positive whole number"),
        ],
    )
    def test_what_is_none_is_refused(self, text: str, message: str, tmp_path: Path) -> None:
        path = tmp_path / "curriculum.toml"
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_curriculum(path)

    def test_rows_and_carried_states(self) -> None:
        with pytest.raises(ArgumentError, match="reads one row"):
            TuningPhase(1, 8, rows=2, carry=True)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"phases": ()}, "at least one phase"),
            ({"lr": 0.0}, "learning rate must be a finite number above 0, such as 2e-5, not 0.0"),
            ({"lr": float("nan")}, "not nan"),
            ({"lr": float("inf")}, "not inf"),
            ({"clip": 0.0}, "finite norm above 0, not to 0.0"),
            ({"clip": float("inf")}, "finite norm above 0, not to inf"),
            ({"lora": -4}, "rank of adapters must be at least 1, or 0 .* not -4"),
        ],
    )
    def test_numbers_that_make_no_recipe(self, values: dict[str, Any], message: str) -> None:
        with pytest.raises(ArgumentError, match=message):
            replace(CURRICULUM, **values)

    def test_a_recipe_as_json(self) -> None:
        assert TuningRecipe.from_dict(CURRICULUM.to_dict()) == CURRICULUM
        assert [CURRICULUM.stage(step) for step in range(8)] == ["short"] * 2 + ["long"] * 4 + ["passing"] * 2
        assert CURRICULUM.learning_rate(0) == CURRICULUM.lr
        assert CURRICULUM.learning_rate(7) < 0.2 * CURRICULUM.lr


class TestSteps:
    def test_only_what_is_to_be_learned_has_a_label(self) -> None:
        tuning = Tuning(tiny_model(), EXAMPLES, CURRICULUM)
        for row in rows(tuning):
            ids, labels, borders = tuning.read(row)
            for span, start in zip(row, borders[:-1].tolist(), strict=True):
                one = EXAMPLES[span.example]
                for t in range(span.start, span.stop):
                    at = start + t - span.start
                    assert ids[0, at] == one.ids[t]
                    learned = t + 1 < len(one) and one.learned[t + 1]
                    assert labels[0, at] == (one.ids[t + 1] if learned else -100)

    def test_a_carried_document_is_read_as_one(self) -> None:
        """While no step is taken, those that carry states see the losses of whole documents."""
        recipe = TuningRecipe((TuningPhase(6, 40, segment=16, bptt="truncated", carry=True),))
        tuning = Tuning(tiny_model().double(), EXAMPLES, recipe)
        summed = sum(m["loss"] * m["labelled"] for m in map(tuning.gradients, range(6)))
        read: dict[int, int] = {}
        for span in (span for row in rows(tuning) for span in row):
            assert span.start == read.get(span.example, 0)
            read[span.example] = span.stop
        model, alone = tiny_model().double(), 0.0
        for number, stop in read.items():
            ids, labels, _ = tuning.read([Span(number, 0, stop)])
            done = backward_in_segments(model, ids, labels, segment=1000)
            alone += float(done.loss) * done.labelled
        assert summed == pytest.approx(alone, rel=1e-12)

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the tracer looks at every tensor's
    def test_compiled_it_computes_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Traced for real, and not anew where documents begin elsewhere; what is left out is the code generator."""
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
        recipe = TuningRecipe((TuningPhase(5, 64, rows=2, segment=32),))
        compiled, plain = Tuning(tiny_model(), EXAMPLES, recipe, compiled=True), Tuning(tiny_model(), EXAMPLES, recipe)
        for step in range(5):
            with torch.compiler.set_stance("default" if step < 2 else "fail_on_recompile"):
                got = compiled.gradients(step)
            assert got["loss"] == pytest.approx(plain.gradients(step)["loss"], rel=1e-5)
        for one, other in zip(compiled.student.parameters(), plain.student.parameters(), strict=True):
            assert one.grad is not None
            assert other.grad is not None
            assert float((one.grad - other.grad).norm()) <= 1e-3 * float(other.grad.norm())

    def test_data_that_are_left_out(self) -> None:
        """A run that goes back reads what comes next, and does not go on in a document from another one's states."""
        phase = TuningPhase(3, 40, segment=16, bptt="truncated", carry=True)
        tuning = Tuning(tiny_model(), EXAMPLES, TuningRecipe((phase,)))
        longer = Tuning(tiny_model(), EXAMPLES, TuningRecipe((replace(phase, steps=9),)))
        tuning.step(0)
        assert tuning.student.stopped_at(tuning.row(1)[0])
        tuning.data_shift = 4
        assert rows(tuning) == rows(longer)[4:7]
        assert not tuning.student.stopped_at(tuning.row(1)[0])

    def test_it_learns(self) -> None:
        recipe = TuningRecipe((TuningPhase(30, 130, segment=64),), lr=1e-2)
        tuning = Tuning(tiny_model(), EXAMPLES[:2], recipe)
        losses = [tuning.step(step)["loss"] for step in range(30)]
        assert np.mean(losses[-3:]) < 0.3 * np.mean(losses[:3])

    def test_a_step_that_is_not_finite_changes_nothing_and_carries_nothing(self) -> None:
        tuning = Tuning(tiny_model(), EXAMPLES, replace(CURRICULUM, phases=CURRICULUM.phases[1:2]))
        tuning.step(0)
        before = {name: x for name, x in weights(tuning).items() if name.startswith("trained")}
        with torch.no_grad():
            tuning.model.lm_head.weight[0, 0] = torch.nan
        assert tuning.step(1)["skipped"] == 1
        assert tuning.student.carry is None
        changed = [name for name, x in before.items() if not weights(tuning)[name].equal(x)]
        assert changed == ["trained.lm_head:weight"]


# PEFT asks transformers in a way that it will not answer in its next major version.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
class TestRuns:
    @pytest.mark.parametrize("lora", [0, 4])
    @pytest.mark.parametrize("stop_after", [1, 3, 5, 7])
    def test_resumed_bit_for_bit(self, lora: int, stop_after: int, tmp_path: Path) -> None:
        """Between the phases and within them, with states that are on their way."""
        if lora:
            pytest.importorskip("peft", reason="pip install power-retention[neighbours]")

        def new() -> Tuning:
            torch.manual_seed(0)
            model: nn.Module = tiny_model()
            return Tuning(with_adapters(model, lora, 8.0) if lora else model, EXAMPLES, CURRICULUM)

        straight, folder = new(), TuningFolder(tmp_path / "straight")
        folder.begin_tuning(CURRICULUM, {})
        execute(straight, folder)
        stopped = TuningFolder(tmp_path / "stopped")
        stopped.begin_tuning(CURRICULUM, {})
        with pytest.raises(RunInterrupted):
            execute(new(), stopped, stop_after=stop_after)
        resumed = new()
        execute(resumed, stopped)
        wanted = weights(straight)
        assert {name: x.equal(wanted[name]) for name, x in weights(resumed).items()} == dict.fromkeys(wanted, True)
        assert straight.student.carry is not None
        assert stopped.read_tuning() == (CURRICULUM, {})

    def test_another_runs_settings_are_refused(self, tmp_path: Path) -> None:
        folder = TuningFolder(tmp_path)
        folder.settings.write_text('{"recipe": {}}')
        with pytest.raises(CheckpointError, match="cannot be read as a fine-tuning's"):
            folder.read_tuning()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
class TestAdapters:
    def test_only_they_and_the_gates_are_trained(self) -> None:
        pytest.importorskip("peft", reason="pip install power-retention[neighbours]")
        model = tiny_model()
        before = copy.deepcopy(model.state_dict())
        tuning = Tuning(with_adapters(model, 4, 8.0), EXAMPLES, replace(CURRICULUM, lora=4))
        for step in range(3):
            tuning.step(step)
        merged = tuning.model.merge_and_unload()  # type: ignore[operator]
        changed = {name for name, x in merged.state_dict().items() if not x.equal(before[name])}
        assert {name.split(".")[-2] if "bias" not in name else name for name in changed} >= {
            "q_proj",
            "down_proj",
            "g_proj",
        }
        assert not any(word in name for name in changed for word in ("norm", "embed", "lm_head"))
