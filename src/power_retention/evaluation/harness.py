"""Benchmarks by lm-evaluation-harness, an extra (``power-retention[tasks]``): each document's score, of any causal model."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import lm_eval
import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from power_retention.errors import ArgumentError, DataError
from power_retention.evaluation.benchmarks import Benchmark, find_benchmark
from power_retention.evaluation.comparison import Scores

HARNESS = f"lm-eval {lm_eval.__version__}"

_USUAL_METRICS = ("acc_norm", "acc", "exact_match", "pass@1", "pass_at_1", "math_verify")
_DEFINITIONS = Path(cast("str", lm_eval.__file__)).parent / "tasks"

Progress = Callable[[int, int], None]


class Suite:
    """Benchmarks with their documents loaded, to be run on several models with the very same prompts.

    Args:
        names: of benchmarks (:mod:`~power_retention.evaluation.benchmarks`) or of any other tasks of the harness.
        task_folder: definitions in the harness's YAML format, which take precedence over its own of the same name.
        limit: documents of each task, the first ones; None for all.
        shots: examples in the prompt of every task that takes some; None for each benchmark's custom.
        max_new_tokens: most tokens of a generated answer; None for each task's own.
        run_code: execute what models write, in processes of their own, where a benchmark is about programs.
        seed: of the choice of examples.

    Raises:
        ArgumentError: no such task, or one that runs code without leave to.
        DataError: documents that cannot be had, or a task whose scores are no means over documents.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        task_folder: Path | None = None,
        limit: int | None = None,
        shots: int | None = None,
        max_new_tokens: int | None = None,
        run_code: bool = False,
        seed: int = 0,
    ) -> None:
        self.benchmarks = [find_benchmark(name) for name in dict.fromkeys(names)]
        self.limit, self.seed, self.run_code = limit, seed, run_code
        if run_code:
            os.environ.setdefault(
                "HF_ALLOW_CODE_EVAL", "1"
            )  # the harness's own programs ask for it when they are loaded
        self._check_leave(*(benchmark.name for benchmark in self.benchmarks if benchmark.runs_code))
        manager = _task_manager(self.benchmarks, task_folder)
        self._tasks = {benchmark.name: _load(benchmark, manager) for benchmark in self.benchmarks}
        for benchmark in self.benchmarks:
            for task in self._tasks[benchmark.name].values():
                self._check_leave(*([benchmark.name] if getattr(task, "UNSAFE_CODE", False) else []))
                _set_shots(task, benchmark.shots if shots is None else shots)
                if max_new_tokens is not None and task.OUTPUT_TYPE == "generate_until":
                    task.set_config("generation_kwargs", {"max_gen_toks": max_new_tokens}, update=True)

    def _check_leave(self, *names: str) -> None:
        if names and not self.run_code:
            raise ArgumentError(
                f"{', '.join(names)} executes the programs that the models write. They run as you, with little to hold them: "
                "say --run-code where that is all right, in a container say."
            )

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 8,
        progress: Callable[[Benchmark], Progress] | None = None,
    ) -> dict[str, Scores]:
        """Scores of a model by benchmark.

        Args:
            model: any causal model, on the device and in the dtype it shall run in.
            tokenizer: its tokenizer.
            batch_size: sequences at once; changes speed and memory, and results by rounding only.
            progress: makes, for a benchmark, what is called with (requests done, requests).
        """
        reader = Reader(model, tokenizer, batch_size)
        scores = {}
        for benchmark in self.benchmarks:
            reader.progress = progress(benchmark) if progress else None
            scores[benchmark.name] = self._run(benchmark, reader)
        return scores

    def _run(self, benchmark: Benchmark, reader: Reader) -> Scores:
        tasks = self._tasks[benchmark.name]
        for task in tasks.values():
            task.set_fewshot_seed(self.seed)  # drawing examples moves it on
        torch.manual_seed(self.seed)
        reader.cut = 0
        with _generation_that_fits(benchmark, reader):
            done = lm_eval.evaluate(
                reader,
                {"tasks": tasks},
                limit=self.limit,
                bootstrap_iters=0,
                confirm_run_unsafe_code=self.run_code,
            )
        parts = [_scores(benchmark, task, done["samples"][name]) for name, task in tasks.items()]
        return Scores(
            np.concatenate([part.values for part in parts]),
            np.concatenate([part.chance for part in parts]),
            tuple(prompt for part in parts for prompt in part.prompts),
            parts[0].metric,
            parts[0].kind,
            parts[0].shots,
            reader.cut,
        )


class Reader(HFLM):  # type: ignore[misc]
    """The harness's view of a model, with our progress, and no state kept where nothing is generated."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
        with _silent("lm_eval.models.huggingface"):  # that a model is given and not named is meant
            super().__init__(pretrained=model.eval(), tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        self.progress: Progress | None = None
        self.cut = 0

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = self.model(inps, use_cache=False).logits
        return logits

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self.set_cache_hook(_Counter(self.progress, len(requests)))
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        self.cut += sum(len(context) + len(answer) > self.max_length + 1 for _, context, answer in requests)
        with _silent("lm_eval.models.huggingface"):  # which warns of each
            answers: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, *args, **kwargs)
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        self.set_cache_hook(_Counter(self.progress, len(requests)))
        answers: list[str] = super().generate_until(requests, disable_tqdm=True)
        return answers

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        if left_truncate_len:
            self.cut += int((mask.sum(-1) > left_truncate_len).sum())
            ids, mask = ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]
        return ids, mask


class _Counter(CacheHook):  # type: ignore[misc]
    """The harness tells it each answer."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        super().__init__(None)
        self.progress, self.total, self.done = progress, total, 0

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self.done += 1
        if self.progress:
            self.progress(self.done, self.total)


@contextmanager
def _silent(logger: str) -> Iterator[None]:
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


@contextmanager
def _generation_that_fits(benchmark: Benchmark, reader: Reader) -> Iterator[None]:
    try:
        yield
    except AssertionError as error:
        if "max tokens to generate" not in str(error):
            raise
        raise ArgumentError(
            f"{benchmark.name} writes answers longer than the {reader.max_length} positions that this model was made for; "
            "shorten them with --max-new-tokens."
        ) from error


def _task_manager(benchmarks: Sequence[Benchmark], task_folder: Path | None) -> TaskManager:
    """An index of the definitions that are needed; reading all of the harness's takes ten seconds."""
    own = [task_folder] if task_folder else []
    if task_folder and not task_folder.is_dir():
        raise ArgumentError(
            f"{task_folder} is not a folder; --task-folder takes one that holds task definitions (.yaml)."
        )
    folders = [_DEFINITIONS / folder for benchmark in benchmarks for folder in benchmark.folders]
    with _silent("lm_eval.tasks._index"):  # that somebody's folder takes precedence is meant
        manager = TaskManager(include_path=[*dict.fromkeys(folders), *own], include_defaults=False)
    wanted = {task for benchmark in benchmarks for task in benchmark.tasks}
    if wanted <= set(manager.all_tasks):
        return manager
    with _silent("lm_eval.tasks._index"):
        manager = TaskManager(include_path=own)
    if unknown := sorted(wanted - set(manager.all_tasks)):
        raise ArgumentError(
            f"There is no benchmark or task named {unknown[0]!r}; `power-retention evaluate --help` names the benchmarks, and "
            "`lm_eval ls tasks` all other tasks."
        )
    return manager


def _load(benchmark: Benchmark, manager: TaskManager) -> dict[str, Task]:
    try:
        tasks: dict[str, Task] = manager.load(list(benchmark.tasks))["tasks"]
    except Exception as error:  # whatever the hub's, the data's and the task's own libraries raise
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{benchmark.name} cannot be loaded ({type(error).__name__}: {reason}). Its documents come from the hub; without "
            "it, give definitions that use local files with --task-folder (docs/evaluation.md)."
        ) from error
    return tasks


def _set_shots(task: Task, shots: int | None) -> None:
    """As the harness does: a task that says 0 takes no examples, one that says nothing takes none unless told."""
    own = task.get_config("num_fewshot")
    if own != 0 and (shots is not None or own is None):
        task.set_config("num_fewshot", shots or 0)


def _scores(benchmark: Benchmark, task: Task, samples: list[dict[str, Any]]) -> Scores:
    reading = benchmark.filter or samples[0]["filter"]
    chosen = [sample for sample in samples if sample["filter"] == reading]
    if not chosen:
        readings = ", ".join(dict.fromkeys(sample["filter"] for sample in samples))
        raise DataError(
            f"{task.task_name} has no filter {reading!r} but {readings}: its definition is not the one expected."
        )
    metric = _metric(benchmark, task, chosen[0])
    listed = [
        len(task.doc_to_choice(sample["doc"])) if task.OUTPUT_TYPE == "multiple_choice" else None for sample in chosen
    ]
    chance = [benchmark.chance_of(sample["doc"], count) for sample, count in zip(chosen, listed, strict=True)]
    return Scores(
        np.array([float(sample[metric]) for sample in chosen]),
        np.array(chance),
        tuple(sample["prompt_hash"] for sample in chosen),
        metric,
        "generation" if task.OUTPUT_TYPE == "generate_until" else "likelihood",
        task.get_config("num_fewshot"),
    )


def _metric(benchmark: Benchmark, task: Task, sample: Mapping[str, Any]) -> str:
    wanted = (benchmark.metric,) if benchmark.metric else _USUAL_METRICS
    for metric in wanted:
        if isinstance(sample.get(metric), int | float | np.number | np.bool_):
            return metric
    raise DataError(
        f"{task.task_name} scores its documents by {', '.join(sample['metrics'])}; a recovery needs one of "
        f"{', '.join(wanted)}, a number for each document."
    )
