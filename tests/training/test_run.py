"""Runs on a real pretrained model: however often one is stopped, it ends where an uninterrupted one does, bit for bit."""

from __future__ import annotations

import copy
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from power_retention.conversion.calibrate import calibrate_mixers
from power_retention.conversion.convert import calibration_windows
from power_retention.conversion.source import Source, open_source
from power_retention.conversion.swap import swap_attention
from power_retention.errors import CheckpointError, OutputError, PowerRetentionError
from power_retention.evaluation.loss import held_out_loss
from power_retention.training import losses
from power_retention.training.folder import RunFolder
from power_retention.training.layers import outputs_kept
from power_retention.training.mixture import read_mixture
from power_retention.training.recipe import Recipe, Stage
from power_retention.training.recording import Figures
from power_retention.training.retraining import Metrics, Retraining
from power_retention.training.run import Progress, RunInterrupted, execute, remove_checkpoints
from power_retention.training.sharding import make_shards
from power_retention.training.text import Tokens, read_documents, tokenize

RECIPE = Recipe(
    steps=8, align_share=0.5, batch=2, length=64, align_lr=4e-3, mixer_lr=2e-3, other_lr=1e-3, hidden_weight=0.5
)


@pytest.fixture(scope="module")
def source(stories_dir: Path) -> Source:
    return open_source(stories_dir)


@pytest.fixture(scope="module")
def corpus(source: Source, stories_text: Path) -> Tokens:
    return tokenize(read_documents([stories_text]), source.tokenizer)


class Runs:
    """Runs of one recipe from the same start."""

    def __init__(self, source: Source, corpus: Tokens) -> None:
        self.source, self.corpus = source, corpus
        self.start = swap_attention(copy.deepcopy(source.model))
        windows = calibration_windows(torch.from_numpy(corpus.ids).long(), count=8, length=256)
        calibrate_mixers(self.start, source.model, windows)

    def new(self, recipe: Recipe = RECIPE, kind: type[Retraining] = Retraining) -> Retraining:
        return kind(copy.deepcopy(self.start), copy.deepcopy(self.source.model), self.corpus, recipe)


@pytest.fixture(scope="module")
def runs(source: Source, corpus: Tokens) -> Runs:
    return Runs(source, corpus)


def begun(path: Path, recipe: Recipe = RECIPE) -> RunFolder:
    folder = RunFolder(path)
    folder.begin(recipe, {"model": "test"})
    return folder


def records(folder: RunFolder) -> list[dict[str, Any]]:
    """The metrics, without what differs between two equal runs: their speed."""
    times = ("tokens_per_second", "seconds", "device_seconds")
    lines = [json.loads(line, parse_constant=pytest.fail) for line in folder.metrics.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in times} for line in lines]


def weights(retraining: Retraining) -> dict[str, Tensor]:
    return dict(retraining.student.state_dict())


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        assert value.equal(wanted[name]), name


@pytest.fixture(scope="module")
def straight(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Weights and records of the run that nothing stopped."""
    retraining, folder = runs.new(), begun(tmp_path_factory.mktemp("runs") / "straight")
    execute(retraining, folder)
    assert os.listdir(folder.checkpoints) == ["step-00000008"]  # kept until the trained model is safely written
    return weights(retraining), records(folder)


def test_the_record_of_a_run(straight: tuple[dict[str, Tensor], list[dict[str, Any]]], runs: Runs) -> None:
    trained, metrics = straight
    assert [line["step"] for line in metrics] == list(range(1, 9))
    assert [line["tokens"] for line in metrics] == [128 * step for step in range(1, 9)]
    assert [line["stage"] for line in metrics] == ["align"] * 4 + ["distil"] * 4
    assert all("alignment_error" in line for line in metrics[:4])
    assert all("kl" in line and "next_token_loss" in line for line in metrics[4:])
    before = runs.start.state_dict()
    assert not any(value.equal(before[name]) for name, value in trained.items() if "g_proj.weight" not in name)


@pytest.mark.parametrize("stops", [[1], [4], [6], [2, 3, 7]], ids=str)
def test_stopped_and_resumed_it_ends_the_same(
    runs: Runs, straight: tuple[dict[str, Tensor], list[dict[str, Any]]], tmp_path: Path, stops: list[int]
) -> None:
    folder = begun(tmp_path)
    for stop in stops:
        torch.manual_seed(stop)  # nothing may depend on the global generator
        with pytest.raises(RunInterrupted, match=f"Stopped after step {stop} of 8; everything is saved"):
            execute(runs.new(), folder, stop_after=stop)
    resumed = runs.new()
    execute(resumed, folder)
    assert_same(weights(resumed), straight[0])
    assert records(folder) == straight[1]


def test_hidden_states_count_beside_the_kl(runs: Runs) -> None:
    """Their gradient is added with its weight, the same where layers are computed again."""
    none, half, whole, again = (
        Retraining(
            copy.deepcopy(runs.start),
            copy.deepcopy(runs.source.model),
            runs.corpus,
            replace(RECIPE, hidden_weight=weight),
            recompute=recompute,
        )
        for weight, recompute in ((0.0, False), (0.5, False), (1.0, False), (1.0, True))
    )
    found = [each.gradients(5, "distil") for each in (none, half, whole, again)]
    assert "hidden_error" not in found[0]
    assert all(each["kl"] == pytest.approx(found[0]["kl"], rel=1e-6) for each in found)
    assert found[1]["loss"] == pytest.approx(found[1]["kl"] + 0.5 * found[1]["hidden_error"], rel=1e-6)
    assert found[3]["loss"] == pytest.approx(found[2]["loss"], rel=1e-6)
    one, two, three, four = (
        torch.cat([p.grad.flatten() for p in each.student.parameters() if p.grad is not None])
        for each in (none, half, whole, again)
    )
    assert float((two - (one + three) / 2).norm() / two.norm()) < 1e-5
    assert float((three - four).norm() / three.norm()) < 1e-5
    assert float((three - one).norm() / one.norm()) > 0.01


@pytest.fixture(scope="module")
def sharded(
    runs: Runs, stories_dir: Path, stories_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Retraining]:
    folder = tmp_path_factory.mktemp("shards") / "stories"
    make_shards([str(stories_text)], str(stories_dir), folder, shard_bytes=50_000)

    def new(**options: Any) -> Retraining:
        student, teacher = copy.deepcopy(runs.start), copy.deepcopy(runs.source.model)
        return Retraining(student, teacher, read_mixture(folder), replace(RECIPE, length=256), **options)

    return new


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the tracer looks at every tensor's
@pytest.mark.parametrize("stage", ["align", "distil"])
def test_compiled_it_computes_the_same(
    sharded: Callable[..., Retraining], stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced for real; what is left out is the code generator, which not every machine has a compiler for."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    losses._compiled.cache_clear()
    plain, compiled = sharded(), sharded(compiled=True)
    for step in range(3):  # the number of documents differs from step to step
        with torch.compiler.set_stance("default" if step < 2 else "fail_on_recompile"):
            got = compiled.gradients(step, stage)
        wanted = plain.gradients(step, stage)
        assert got["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
    losses._compiled.cache_clear()
    for one, other in zip(compiled.student.parameters(), plain.student.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None and other.grad is not None:
            assert float((one.grad - other.grad).norm()) <= 1e-3 * float(other.grad.norm())


def packed_step(retraining: Retraining) -> int:
    """A step whose first sequence holds the border of two documents."""
    return next(step for step in range(99) if retraining._read(step).cu_seqlens.tolist()[1] < 256)  # type: ignore[union-attr]


class TestOnShards:
    """The same on token shards, whose documents do not see each other."""

    def test_stopped_and_resumed_it_ends_the_same(self, sharded: Callable[[], Retraining], tmp_path: Path) -> None:
        straight, resumed = sharded(), sharded()
        execute(straight, begun(tmp_path / "straight"))
        folder = begun(tmp_path / "stopped")
        for stop in (3, 6):
            with pytest.raises(RunInterrupted):
                execute(sharded(), folder, stop_after=stop)
        execute(resumed, folder)
        assert_same(weights(resumed), weights(straight))
        assert records(folder) == records(RunFolder(tmp_path / "straight"))

    def test_the_loss_is_that_of_each_document_alone(self, sharded: Callable[[], Retraining]) -> None:
        retraining = sharded()
        step = packed_step(retraining)
        got = retraining.gradients(step, "distil")
        gradient = retraining.student.mixers[0].k_proj.weight.grad
        retraining.optimizer.zero_grad()
        read = retraining._read(step)
        assert read.cu_seqlens is not None
        borders = read.cu_seqlens.tolist()
        assert len(borders) > 3
        ids, positions = read.ids.flatten(), read.positions.flatten()
        kl, error = torch.zeros(()), torch.zeros(())
        for start, stop in pairwise(borders):
            piece = {
                "input_ids": ids[None, start:stop],
                "position_ids": positions[None, start:stop],
                "use_cache": False,
            }
            with torch.no_grad(), outputs_kept(retraining.teacher.model.layers) as theirs:
                wanted = retraining.teacher(**piece).logits.log_softmax(-1)
            with outputs_kept(retraining.student.model.layers) as ours:
                log_probability = retraining.student(**piece).logits.log_softmax(-1)
            kl = kl + (wanted.exp() * (wanted - log_probability)).sum() / len(ids)
            apart = ((a - b).square().sum(-1) / b.square().sum(-1) for a, b in zip(ours, theirs, strict=True))
            error = error + sum((1 + each).log().sum() for each in apart) / len(theirs) / len(ids)
        (kl + RECIPE.hidden_weight * error).backward()
        assert got["kl"] == pytest.approx(float(kl.detach()), rel=1e-4)
        assert got["hidden_error"] == pytest.approx(float(error.detach()), rel=1e-4)
        alone = retraining.student.mixers[0].k_proj.weight.grad
        assert gradient is not None
        assert alone is not None
        assert float((gradient - alone).norm() / alone.norm()) < 1e-3

    def test_aligning_sees_each_document_alone(self, sharded: Callable[[], Retraining]) -> None:
        """Other text in the documents before changes nothing in those after: leaks would."""
        retraining = sharded()
        read = retraining._read(packed_step(retraining))
        assert read.cu_seqlens is not None
        border = read.cu_seqlens.tolist()[1]
        leaky = replace(read, starts=None, cu_seqlens=None)  # shows that a leak would be seen
        for packing, leaks in ((read, False), (leaky, True)):
            outputs = []
            for ids in (read.ids, read.ids.flatten().index_fill(0, torch.arange(border), 5).view_as(read.ids)):
                seen: list[Tensor] = []
                hook = retraining.student.mixers[-1].register_forward_hook(
                    lambda _, __, out, seen=seen: seen.append(out[0].detach())
                )
                retraining._align(replace(packing, ids=ids))
                hook.remove()
                outputs.append(seen[0].flatten(0, 1)[border:])
            assert torch.allclose(outputs[0], outputs[1], rtol=1e-4, atol=1e-5) != leaks


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(
    runs: Runs, straight: tuple[dict[str, Tensor], list[dict[str, Any]]], tmp_path: Path, number: signal.Signals
) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def interrupt(progress: Progress) -> None:
        if progress.step == 5:
            os.kill(os.getpid(), number)

    folder = begun(tmp_path)
    with pytest.raises(RunInterrupted, match="Stopped after step 5 of 8"):
        execute(runs.new(), folder, watch=interrupt)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    resumed = runs.new()
    execute(resumed, folder)
    assert_same(weights(resumed), straight[0])
    assert records(folder) == straight[1]


def test_a_second_signal_acts_at_once(runs: Runs, tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        execute(runs.new(), begun(tmp_path), watch=interrupt)


KILLED_RUN = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from power_retention.conversion.source import open_source
from power_retention.models import PowerRetentionForCausalLM
from power_retention.training.retraining import Retraining
from power_retention.training.folder import RunFolder
from power_retention.training.run import execute
from power_retention.training.text import read_documents, tokenize

student, teacher, text, path = sys.argv[1:]
source, folder = open_source(teacher), RunFolder(Path(path))
tokens = tokenize(read_documents([Path(text)]), source.tokenizer)

def watch(progress):
    if progress.step == 6:
        os.kill(os.getpid(), signal.SIGKILL)

retraining = Retraining(PowerRetentionForCausalLM.from_pretrained(student), source.model, tokens, folder.read_settings()[0])
execute(retraining, folder, watch=watch, checkpoint_seconds=0)
"""


def test_killed_it_continues_from_its_last_checkpoint(
    runs: Runs,
    straight: tuple[dict[str, Tensor], list[dict[str, Any]]],
    stories_dir: Path,
    stories_text: Path,
    tmp_path: Path,
) -> None:
    """SIGKILL after step 6 is recorded and before it is saved; its record, cut off in the middle, is not trusted."""
    runs.start.save_pretrained(tmp_path / "student")
    folder = begun(tmp_path / "run")
    arguments = [tmp_path / "student", stories_dir, stories_text, folder.path]
    result = subprocess.run([sys.executable, "-c", KILLED_RUN, *arguments], capture_output=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()
    assert sorted(os.listdir(folder.checkpoints))[-1] in ("step-00000004", "step-00000005")  # 5 was being written
    content = folder.metrics.read_text()
    assert len(content.splitlines()) == 6
    folder.metrics.write_text(content[:-20])
    resumed = runs.new()
    execute(resumed, folder)
    assert_same(weights(resumed), straight[0])
    assert records(folder) == straight[1]
    remove_checkpoints(folder)
    assert sorted(os.listdir(folder.path)) == ["metrics.jsonl", "run.json", "sittings.jsonl"]


def test_a_step_is_a_function_of_state_seed_and_number(runs: Runs) -> None:
    one, other = runs.new(), runs.new()
    torch.manual_seed(1)
    first = one.step(6)
    torch.manual_seed(2)
    torch.rand(5)
    other.gradients(2)
    other.optimizer.zero_grad(set_to_none=True)
    assert other.step(6) == first
    assert_same(weights(one), weights(other))
    reseeded = runs.new(replace(RECIPE, seed=1))
    assert reseeded.step(6)["loss"] != first["loss"]


def test_aligning_leaves_everything_but_the_mixers(runs: Runs) -> None:
    retraining = runs.new()
    retraining.step(0)
    before = runs.start.state_dict()
    changed = {name for name, value in weights(retraining).items() if not value.equal(before[name])}
    assert changed
    assert all(".self_attn." in name for name in changed)


def test_the_teacher_is_only_read(runs: Runs, source: Source) -> None:
    retraining = runs.new()
    retraining.step(0)
    retraining.step(7)
    assert_same(dict(retraining.teacher.state_dict()), dict(source.model.state_dict()))
    assert all(value.grad is None for value in retraining.teacher.parameters())


def test_measuring_the_time_of_a_step_trains_nothing(runs: Runs) -> None:
    retraining = runs.new()
    seconds = retraining.seconds_per_step()
    assert sorted(seconds) == ["align", "distil"]
    assert all(0 < value < 10 for value in seconds.values())
    assert_same(weights(retraining), dict(runs.start.state_dict()))
    assert not retraining.optimizer.state
    assert all(value.grad is None for value in retraining.student.parameters())


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights(runs: Runs) -> None:
    retraining, exact = runs.new(replace(RECIPE, precision="bfloat16")), runs.new()
    for step in (0, 5):
        low, high = retraining.step(step)["loss"], exact.step(step)["loss"]
        assert low != high
        assert low == pytest.approx(high, rel=0.05)
    assert {value.dtype for value in retraining.student.parameters()} == {torch.float32}
    assert {value.dtype for value in retraining.teacher.parameters()} == {torch.bfloat16}


class Faulty(Retraining):
    """A gradient goes wrong at some steps."""

    faulty: Callable[[int], bool]

    def step(self, step: int) -> Metrics:
        self.now = step
        return super().step(step)

    def _gradients(self, read: Any, stage: Stage) -> Figures:
        figures = super()._gradients(read, stage)
        if type(self).faulty(self.now):
            self.student.model.layers[0].self_attn.g_proj.bias.grad[0] = torch.nan
            figures["loss"] = torch.tensor(torch.nan)
        return figures


def test_a_step_that_is_not_finite_is_skipped(runs: Runs, tmp_path: Path) -> None:
    class FaultyTwice(Faulty):
        faulty = staticmethod(lambda step: step in (2, 5))

    retraining, folder, snapshots = runs.new(kind=FaultyTwice), begun(tmp_path), []
    execute(retraining, folder, watch=lambda _: snapshots.append(copy.deepcopy(weights(retraining))))
    assert [line["skipped"] for line in records(folder)] == [0, 0, 1, 0, 0, 1, 0, 0]
    assert [line["loss"] is None for line in records(folder)] == [False, False, True, False, False, True, False, False]
    for step in range(1, 8):
        same = all(value.equal(snapshots[step - 1][name]) for name, value in snapshots[step].items())
        assert same == (step in (2, 5))
    assert all(torch.isfinite(value).all() for value in weights(retraining).values())


def test_five_in_a_row_end_the_run(runs: Runs, tmp_path: Path) -> None:
    class FaultyFromThree(Faulty):
        faulty = staticmethod(lambda step: step >= 3)

    retraining, folder = runs.new(replace(RECIPE, steps=20), kind=FaultyFromThree), begun(tmp_path)
    with pytest.raises(PowerRetentionError, match="not finite for 5 steps in a row, up to step 8: lower the learning"):
        execute(retraining, folder)
    assert len(records(folder)) == 8
    assert all(torch.isfinite(value).all() for value in weights(retraining).values())


def test_a_full_disk_stops_the_run_and_keeps_what_was_saved(
    runs: Runs,
    straight: tuple[dict[str, Tensor], list[dict[str, Any]]],
    disk_of: Callable[[int], Path],
    tmp_path: Path,
) -> None:
    """The disk has room for one checkpoint: of the two stages, distilling needs the larger one."""
    folder = begun(disk_of(5500) / "run")
    with pytest.raises(RunInterrupted):
        execute(runs.new(), folder, stop_after=5)
    with pytest.raises(OutputError, match="Could not write"):
        execute(runs.new(), folder, stop_after=7)
    assert os.listdir(folder.checkpoints) == ["step-00000005"]
    roomier = RunFolder(tmp_path / "run")
    shutil.copytree(folder.path, roomier.path)
    resumed = runs.new()
    execute(resumed, roomier)
    assert_same(weights(resumed), straight[0])
    assert records(roomier) == straight[1]


def test_settings_that_cannot_be_read(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    assert folder.read_settings() == (RECIPE, {"model": "test"})
    for content in ("", "{", '{"recipe": {}}', '{"recipe": {"stepz": 3}, "inputs": {}}'):
        folder.settings.write_text(content)
        with pytest.raises(CheckpointError, match=r"cannot be read .* start the run in a new folder"):
            folder.read_settings()


def test_both_stages_learn(runs: Runs, source: Source, corpus: Tokens, tmp_path: Path) -> None:
    """One small budget: the error of the layers falls, then the KL, and held-out text is predicted far better."""
    recipe = Recipe(steps=50, align_share=0.5, batch=4, length=128, align_lr=8e-3, mixer_lr=4e-3, other_lr=1e-3)
    windows = torch.stack(
        [corpus.window(i, 128) for i in range(-12 + corpus.window_count(128), corpus.window_count(128))]
    )
    seen = Tokens(corpus.ids[: -13 * 128], corpus.starts)
    teacher = held_out_loss(source.model, windows)
    before = held_out_loss(runs.start, windows, teacher=source.model)
    retraining = Retraining(copy.deepcopy(runs.start), copy.deepcopy(source.model), seen, recipe)
    folder = begun(tmp_path, recipe)
    execute(retraining, folder)
    metrics = records(folder)

    def mean(key: str, steps: slice) -> float:
        values = [line[key] for line in metrics[steps]]
        return sum(values) / len(values)

    assert mean("alignment_error", slice(20, 25)) < 0.8 * mean("alignment_error", slice(0, 5))
    assert mean("kl", slice(40, 50)) < 0.95 * mean("kl", slice(25, 35))
    after = held_out_loss(retraining.student, windows, teacher=source.model)
    assert after.kl < 0.5 * before.kl
    assert (before.loss - after.loss) / (before.loss - teacher.loss) > 0.5
