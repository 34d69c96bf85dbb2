"""Every question of the long-context suite has its answer in the context: who looks up is right, who guesses is at chance."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from long_readers import LOOK_UPS, Guesser, LookUp, random_words

from power_retention.errors import ArgumentError, DataError
from power_retention.evaluation.long.asking import Answer, Effort, ask
from power_retention.evaluation.long.context import Context, Encoder, Haystack, TooShortError, plant
from power_retention.evaluation.long.facts import TWO_FACTS, tell
from power_retention.evaluation.long.report import clustered, shortfalls, task_reports
from power_retention.evaluation.long.suite import GENERATORS, Grid, write_contexts
from power_retention.evaluation.long.tree import WITH, WITHOUT, SourceTree

DEPTHS = (0.0, 0.5, 1.0)
LENGTHS = {"common words": 2400, "variable tracking": 1500}
EFFORT = Effort(tokens=512, memory_bytes=1 << 30)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    import real_models

    return Encoder(real_models.read_llama2c_tokenizer(real_models.STORIES_FILES / "tokenizer.bin"))


@pytest.fixture(scope="module")
def haystack(encoder: Encoder, stories_text: Path) -> Haystack:
    stories = [json.loads(line)["text"] for line in stories_text.read_text().splitlines()[:100]]
    return Haystack([*stories, " ".join(random_words(600))], encoder, tokens=8000)


def make(task: str, haystack: Haystack, seeds: Sequence[int] = (0, 1)) -> list[Context]:
    length = LENGTHS.get(task, 1200)
    return [context for seed in seeds for context in GENERATORS[task](haystack, length, DEPTHS, seed)]


@pytest.mark.parametrize("task", list(GENERATORS))
class TestGenerators:
    def test_who_looks_up_is_right(self, task: str, haystack: Haystack) -> None:
        reader = LookUp(haystack.encoder, LOOK_UPS[task])
        contexts = make(task, haystack)
        answers = ask(reader, contexts, haystack.encoder, EFFORT)
        assert len(answers) == sum(len(context.questions) for context in contexts)
        wrong = [(x.question, x.generated) for x in answers if x.recalled < 1 or x.chosen < 1]
        assert not wrong, wrong[0]

    def test_contexts_are_as_long_as_they_say(self, task: str, haystack: Haystack) -> None:
        for context in make(task, haystack):
            assert context.task == task
            whole = len(context.ids) + haystack.encoder.room(context.questions, context.length)
            assert context.length - 48 <= whole <= context.length

    def test_a_seed_has_its_own_texts_and_the_same_ones_again(self, task: str, haystack: Haystack) -> None:
        first, again, other = (make(task, haystack, [seed])[0] for seed in (0, 0, 1))
        assert first.ids.tolist() == again.ids.tolist()
        assert first.questions == again.questions
        assert first.questions[0].answers != other.questions[0].answers

    def test_too_short_is_said(self, task: str, haystack: Haystack) -> None:
        with pytest.raises(TooShortError):
            GENERATORS[task](haystack, 100, DEPTHS, 0)


@pytest.mark.parametrize("task", ["multi-key needle", "facts", "frequent words"])
def test_who_guesses_is_at_chance(task: str, haystack: Haystack) -> None:
    contexts = make(task, haystack, range(30 if task == "frequent words" else 12))
    answers = ask(Guesser(haystack.encoder), contexts, haystack.encoder, EFFORT)
    chance = sum(1 / len(x.question.candidates) for x in answers) / len(answers)
    right = sum(x.chosen for x in answers) / len(answers)
    assert right == pytest.approx(chance, abs=4 * math.sqrt(chance * (1 - chance) / len(answers)))
    assert sum(x.recalled for x in answers) / len(answers) < 0.1


def test_a_needle_stands_at_its_depth(haystack: Haystack) -> None:
    for context in make("needle", haystack, [0]):
        (question,) = context.questions
        text = haystack.encoder.decode(context.ids)
        assert question.depth == pytest.approx(text.index(question.answers[0]) / len(text), abs=0.12)


def test_one_reading_serves_all_questions(haystack: Haystack) -> None:
    contexts = make("facts", haystack, [0])
    reader = LookUp(haystack.encoder, LOOK_UPS["facts"])
    ask(reader, contexts, haystack.encoder, EFFORT)
    asked = 3 * 60 * len(contexts[0].questions)  # each question's tokens, read once, and its candidates'
    assert reader.tokens_read < len(contexts[0].ids) + asked + 2000


def test_what_is_beyond_the_window_is_not_asked(haystack: Haystack) -> None:
    contexts = make("needle", haystack, [0])
    assert ask(Guesser(haystack.encoder, longest=contexts[0].length - 1), contexts, haystack.encoder, EFFORT) == []
    assert ask(Guesser(haystack.encoder, longest=contexts[0].length), contexts, haystack.encoder, EFFORT)


def test_stories_hold_what_they_ask() -> None:
    two = 0
    for seed in range(50):
        sentences, people, objects = tell(random.Random(seed))
        assert set(people) == {"Alma", "Boris", "Clara", "Dmitri", "Edith"}
        assert all(any(thing in sentence for sentence in sentences) for thing in objects)
        two += len(objects)
    assert two > 100


class TestHaystack:
    def test_fills_exactly(self, haystack: Haystack) -> None:
        rng = random.Random(0)
        for tokens in (0, 1, 5, 33, 700, 20_000):
            assert sum(map(len, haystack.fill(tokens, rng))) == tokens

    def test_pieces_keep_order_and_place(self) -> None:
        filler = [[1] * 10, [2] * 10, [3] * 10]
        assert plant(filler, [(0.0, [7]), (0.0, [8]), (1.0, [9])]) == [7, 8, *[1] * 10, *[2] * 10, *[3] * 10, 9]
        assert plant(filler, [(0.4, [7])]) == [*[1] * 10, 7, *[2] * 10, *[3] * 10]

    def test_too_little_text_is_refused(self, encoder: Encoder) -> None:
        with pytest.raises(DataError, match="200 words"):
            Haystack(["A cat sat."], encoder)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> SourceTree:
    """Twelve files, of which one defines functions that two others use."""
    root = tmp_path_factory.mktemp("tree")
    names = random_words(60, seed=3)
    body = "\n".join(f"def {name}_it(x):\n    return x\n" for name in names[:8])
    (root / "helpers.py").write_text(f"{body}\n{'#' * 300}\n")
    for user, used in (("first", names[0:3]), ("second", names[3:6])):
        calls = "\n".join(f"value = helpers.{name}_it(value)" for name in used)
        (root / f"{user}.py").write_text(f"import helpers\n\nvalue = 1\n{calls}\n{'# ' + 'x' * 400}\n")
    for i in range(40):
        lines = "\n".join(f"{name}_{i} = {j}" for j, name in enumerate(names[10:50]))
        (root / f"other{i}.py").write_text(lines)
    (root / "tests").mkdir()
    (root / "tests" / "skipped.py").write_text("helpers." * 200)
    return SourceTree(root)


class TestSourceTree:
    def test_names_are_known_from_the_defining_file_alone(self, tree: SourceTree, encoder: Encoder) -> None:
        there, gone = tree.contexts(encoder, 6000, 0)
        assert len(there.ids) == len(gone.ids)
        for context, variant in ((there, WITH), (gone, WITHOUT)):
            text = encoder.decode(context.ids)
            assert len(context.ids) + encoder.room(context.questions, 6000) == 6000
            for question in context.questions:
                (name,) = question.answers
                assert (f"def {name}(" in text) == (variant == WITH)
                assert name not in question.text
                assert question.text.endswith("helpers.")
                assert question.candidates[0] == name
                assert len(set(question.candidates)) == 4
        assert [q.text for q in there.questions] == [q.text for q in gone.questions]
        assert len(there.questions) == 4

    def test_a_short_context_is_refused(self, tree: SourceTree, encoder: Encoder) -> None:
        with pytest.raises(TooShortError, match="half"):
            tree.contexts(encoder, 300, 0)

    def test_a_tree_without_uses_is_refused(self, tmp_path: Path) -> None:
        for i in range(12):
            (tmp_path / f"file{i}.py").write_text("x = 1\n" * 100)
        with pytest.raises(DataError, match="uses what another"):
            SourceTree(tmp_path)

    def test_the_standard_library_is_a_tree(self) -> None:
        tree = SourceTree()
        assert len(tree.uses) > 50
        assert all(use.file.text[use.at :].startswith(use.name) for uses in tree.uses.values() for use in uses)


class TestReport:
    def test_means_errors_and_gains(self, haystack: Haystack) -> None:
        contexts = make("facts", haystack, [0, 1, 2])
        reader = LookUp(haystack.encoder, LOOK_UPS["facts"])
        known, guessed = (ask(x, contexts, haystack.encoder, EFFORT) for x in (reader, Guesser(haystack.encoder)))
        report = task_reports({"teacher": known, "student": guessed}, {"facts": {64: "too short"}})["facts"]
        assert report["missing"] == {"64": "too short"}
        teacher, student = report["lengths"]["1200"]["teacher"], report["lengths"]["1200"]["student"]
        assert teacher["generation"] == {"value": 1.0, "error": 0.0}
        assert teacher["contexts"] == 3
        assert teacher["questions"] == len(known)
        assert set(teacher["by_variant"]) == {"one fact", TWO_FACTS}
        assert teacher["chance"] == pytest.approx(1 / 6)
        assert student["nats"]["value"] > teacher["nats"]["value"]
        (short,) = shortfalls({"facts": report})
        assert short["value"] == pytest.approx(1 - student["generation"]["value"])

    def test_errors_are_over_contexts(self, haystack: Haystack) -> None:
        contexts = make("facts", haystack, [0, 1])
        answers = [
            Answer(context, question, question.answers[0] if i else "", (0.0,), 0.0)
            for i, context in enumerate(contexts)
            for question in context.questions
        ]
        estimate = clustered(answers, lambda x: x.recalled)
        assert (estimate.value, estimate.error) == (0.5, 0.5)

    def test_what_a_file_is_worth_is_paired(self, encoder: Encoder) -> None:
        def answer(seed: int, variant: str, nats: float) -> Answer:
            from power_retention.evaluation.long.context import Question

            question = Question("m.", ("name",), ("name", "other"), variant=variant)
            return Answer(Context("identifiers", 64, seed, torch.zeros(1), (question,)), question, "", (-1, -2), nats)

        given = [answer(s, v, n) for s, v, n in ((0, WITH, 1), (0, WITHOUT, 4), (1, WITH, 2), (1, WITHOUT, 7))]
        row = task_reports({"student": given}, {})["identifiers"]["lengths"]["64"]["student"]
        assert row["gain_nats"] == {"value": 4.0, "error": 1.0}
        assert row["questions"] == 2


class TestGrid:
    def test_all_contexts_of_a_grid(self, haystack: Haystack) -> None:
        grid = Grid(lengths=(60, 1200), depths=3, seeds=2, tasks=("needle", "facts"))
        contexts, missing = write_contexts(grid, haystack, None)
        assert [(x.task, x.length, x.seed) for x in contexts] == [
            *[("needle", 1200, 0)] * 3, *[("needle", 1200, 1)] * 3, ("facts", 1200, 0), ("facts", 1200, 1)
        ]  # fmt: skip
        assert set(missing) == {"needle", "facts"}
        assert set(missing["facts"]) == {60}

    def test_refusals(self) -> None:
        with pytest.raises(ArgumentError, match="There is no long-context task 'noodle'"):
            Grid(tasks=("noodle",))
        with pytest.raises(ArgumentError, match="at least 1"):
            Grid(depths=0)
