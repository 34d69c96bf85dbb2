"""Many real processes (gloo) compute what one does, and nothing that happens to one of them loses anything."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from worlds import in_ranks, start_ranks

from power_retention.conversion.swap import swap_attention
from power_retention.errors import ArgumentError, RunInterrupted
from power_retention.evaluation.dry_run import Layout, lay_out
from power_retention.models import PowerRetentionForCausalLM
from power_retention.training.checkpoint import Checkpoints
from power_retention.training.domains import Domain
from power_retention.training.folder import RunFolder, read_records
from power_retention.training.mixture import pack, read_mixture
from power_retention.training.parallel import ALONE, Ranks, whole_tensors
from power_retention.training.probes import Probes
from power_retention.training.recipe import Recipe
from power_retention.training.recording import Figures
from power_retention.training.retraining import Metrics, Retraining
from power_retention.training.run import Progress, execute
from power_retention.training.sharding import make_shards
from power_retention.training.text import Tokens
from tiny_models import tiny_parent, tokens

RECIPE = Recipe(
    steps=8,
    align_share=0.5,
    batch=4,
    length=32,
    align_lr=2e-3,
    mixer_lr=1e-3,
    other_lr=5e-4,
    next_token_weight=0.2,
    hidden_weight=0.5,
)
SAME = 1e-6
"""Relative difference of losses between numbers of ranks."""


@dataclass(frozen=True)
class Task:
    """What the ranks of a test do; everything by path, as each process opens its own."""

    models: Path
    run: Path
    shards: Path | None = None
    recipe: Recipe = RECIPE
    stop_after: int | None = None
    checkpoint_seconds: float = 1e9
    probed: bool = False
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Done:
    """What a rank saw: its records' losses, and on the first rank the weights."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    said: list[str]


def open_models(models: Path, ranks: Ranks) -> tuple[PowerRetentionForCausalLM, Any]:
    """From disk on the first rank; on the others only their shapes."""
    student = AutoModelForCausalLM.from_pretrained(models / "student")
    teacher = AutoModelForCausalLM.from_pretrained(models / "teacher")
    if ranks.first:
        return student, teacher
    with torch.device("meta"):
        shapes = [AutoModelForCausalLM.from_config(model.config) for model in (student, teacher)]
    return shapes[0], shapes[1]


def begin(ranks: Ranks, task: Task, kind: type[Retraining] = Retraining) -> tuple[Retraining, RunFolder]:
    text = tokens(20_000).numpy().astype("int32")
    data = read_mixture(task.shards) if task.shards else Tokens(text, torch.tensor([0, len(text)]).numpy())
    cpu = torch.device("cpu")
    retraining = kind(
        *open_models(task.models, ranks), data, task.recipe, device=cpu, ranks=ranks, **dict(task.options)
    )
    folder = RunFolder(task.run)
    if ranks.first and not folder.exists:
        folder.begin(task.recipe, {})
    ranks.wait()
    return retraining, folder


def train(
    ranks: Ranks, task: Task, kind: type[Retraining] = Retraining, watch: Callable[[Progress], None] | None = None
) -> Done:
    retraining, folder = begin(ranks, task, kind)
    metrics: list[Metrics] = []
    said: list[str] = []

    def note(progress: Progress) -> None:
        metrics.append(progress.metrics)
        if watch is not None:
            watch(progress)

    try:
        execute(
            retraining,
            folder,
            watch=note,
            tell=said.append,
            probes=Probes(retraining, [some_domain()], every=1) if task.probed else None,
            checkpoint_seconds=task.checkpoint_seconds,
            stop_after=task.stop_after,
        )
    except RunInterrupted as stopped:
        said.append(str(stopped))
    losses, norms = ([each[key] for each in metrics] for key in ("loss", "gradient_norm"))
    return Done(losses, norms, whole_tensors(retraining.student, ranks), said)


def some_domain() -> Domain:
    ids = tokens(3, 41).numpy()
    return Domain("text", [pack([(row, np.array([0, 17])) for row in ids], 40)], kept_out=True)


def assert_near(got: list[float], wanted: list[float], tolerance: float = SAME) -> None:
    assert got == pytest.approx(wanted, rel=tolerance)


def assert_equal(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    assert all(value.equal(wanted[name]) for name, value in got.items())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models("llama", tmp_path_factory.mktemp("models"))


def save_models(kind: str, folder: Path) -> Path:
    teacher = tiny_parent(kind)
    teacher.save_pretrained(folder / "teacher")
    swap_attention(copy.deepcopy(teacher), key_bias=True).save_pretrained(folder / "student")
    return folder


@pytest.fixture(scope="module")
def alone(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """The run in one process that nothing stopped."""
    return train(ALONE, Task(models, tmp_path_factory.mktemp("runs") / "alone"))


@pytest.mark.parametrize(
    ("size", "dp_replicate"), [(2, 1), (4, 1), (4, 2), (2, 2)], ids=["2", "4", "2 groups of 2", "2 of all"]
)
def test_any_number_of_ranks_computes_the_same(
    models: Path, alone: Done, tmp_path: Path, size: int, dp_replicate: int
) -> None:
    done = in_ranks(train, size, Task(models, tmp_path), dp_replicate=dp_replicate)
    for each in done:
        assert_near(each.losses, alone.losses)
        assert_near(each.norms, alone.norms, 1e-4)
    lines = [json.loads(line) for line in RunFolder(tmp_path).metrics.read_text().splitlines()]
    assert [line["loss"] for line in lines] == done[0].losses


@pytest.fixture(scope="module")
def shards(stories_dir: Path, stories_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "stories"
    make_shards([str(stories_text)], str(stories_dir), folder, shard_bytes=50_000)
    return folder


@pytest.mark.parametrize("dp_replicate", [1, 2])
def test_packed_documents_with_unequal_numbers_of_labels(
    stories_dir: Path, shards: Path, tmp_path: Path, dp_replicate: int
) -> None:
    """The mean is that over all labels, however they are spread over the ranks; on real weights with a tied head."""
    teacher = AutoModelForCausalLM.from_pretrained(stories_dir)
    teacher.save_pretrained(tmp_path / "teacher")
    swap_attention(teacher).save_pretrained(tmp_path / "student")
    task = Task(tmp_path, tmp_path / "run", shards, replace(RECIPE, length=256, steps=4, align_share=0.25))
    with_borders = [
        len(begin(ALONE, replace(task, run=tmp_path / "x"))[0]._read(step).cu_seqlens)  # type: ignore[arg-type]
        for step in range(4)
    ]
    assert max(with_borders) > 5
    alone = train(ALONE, replace(task, run=tmp_path / "alone"))
    for done in in_ranks(train, 2, task, dp_replicate=dp_replicate):
        assert_near(done.losses, alone.losses)


def gradients_of(ranks: Ranks, task: Task) -> dict[str, Tensor]:
    retraining, _ = begin(ranks, task)
    found = {}
    for stage in ("align", "distil"):
        retraining.gradients(0, stage)  # type: ignore[arg-type]
        for name, value in retraining.student.named_parameters():
            if value.grad is not None:
                whole = value.grad.full_tensor() if ranks.size > 1 else value.grad  # type: ignore[attr-defined]
                found[f"{stage} {name}"] = whole.clone()
        retraining.optimizer.zero_grad()
    return found


def assert_gradients_near(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == wanted.keys()
    assert any(name.startswith("align") for name in got)
    for name, value in got.items():
        largest = max(float(each.abs().max()) for each in wanted.values())
        assert float((value - wanted[name]).abs().max()) < tolerance * largest, name


@pytest.mark.parametrize("kind", ["qwen3_moe", "glm4_moe", "starcoder2"])
def test_gradients_of_every_kind_of_layer(kind: str, tmp_path: Path) -> None:
    task = Task(save_models(kind, tmp_path), tmp_path / "run")
    wanted = gradients_of(ALONE, task)
    assert_gradients_near(in_ranks(gradients_of, 2, task)[1], wanted, 1e-6)


def test_layers_computed_again_have_the_same_gradients(models: Path, tmp_path: Path) -> None:
    task = Task(models, tmp_path)
    again = replace(task, options=(("recompute", True),))
    wanted = gradients_of(ALONE, task)
    assert_gradients_near(gradients_of(ALONE, again), wanted, 1e-7)
    assert_gradients_near(in_ranks(gradients_of, 2, again)[0], wanted, 1e-6)


def test_bfloat16_is_gathered_and_float32_is_kept(models: Path, tmp_path: Path) -> None:
    task = Task(models, tmp_path, recipe=replace(RECIPE, precision="bfloat16"))
    exact, narrow = gradients_of(ALONE, replace(task, recipe=RECIPE)), gradients_of(ALONE, task)
    sharded = in_ranks(gradients_of, 2, task)[0]
    assert {value.dtype for value in sharded.values()} == {torch.float32}
    assert_gradients_near(sharded, narrow, 0.05)
    name = "distil model.layers.0.mlp.down_proj.weight"
    errors = [float((each[name] - exact[name]).norm() / exact[name].norm()) for each in (sharded, narrow)]
    assert 1e-4 < errors[0] < 2 * errors[1]


@pytest.mark.parametrize("kind", ["qwen3_moe", "glm4_moe"])
def test_experts_in_bfloat16(kind: str, tmp_path: Path) -> None:
    task = Task(save_models(kind, tmp_path), tmp_path / "run")
    exact = gradients_of(ALONE, task)
    task = replace(task, recipe=replace(RECIPE, precision="bfloat16"))
    shared, alone = in_ranks(gradients_of, 2, task)[0], gradients_of(ALONE, task)
    assert shared.keys() == alone.keys() == exact.keys()

    def error(got: dict[str, Tensor]) -> float:
        """Of everything: single gradients, such as a key bias's, are all rounding, and a token may change experts."""
        return math.sqrt(sum(float((got[name] - wanted).square().sum()) for name, wanted in exact.items()))

    assert 0 < error(shared) < 1.5 * error(alone)


def own_elements(ranks: Ranks, task: Task) -> int:
    retraining, _ = begin(ranks, task)
    return sum(value.to_local().numel() for value in retraining.student.parameters())  # type: ignore[attr-defined]


def test_the_first_rank_holds_what_a_dry_run_says(models: Path, tmp_path: Path) -> None:
    held = in_ranks(own_elements, 4, Task(models, tmp_path))
    config = AutoModelForCausalLM.from_pretrained(models / "student").config
    assert max(held) == held[0] == lay_out(config, Layout(4, batch=4, length=32)).weights / 4


def test_a_batch_that_cannot_be_shared_out_is_refused(models: Path, tmp_path: Path) -> None:
    done = start_ranks(train, 2, Task(models, tmp_path, recipe=replace(RECIPE, batch=3)))
    assert all("batch of 3 sequences cannot be shared out evenly among 2 ranks" in each.error for each in done)
    with pytest.raises(ArgumentError, match="multiple of 4"):
        Ranks(1, 4).rows(6)


def test_ranks_that_cannot_be_grouped_are_refused(models: Path, tmp_path: Path) -> None:
    done = start_ranks(train, 2, Task(models, tmp_path), dp_replicate=3)
    assert all("2 ranks cannot be divided into 3 groups" in each.error for each in done)


@pytest.fixture(scope="module")
def straight(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """The run in two processes that nothing stopped."""
    done: Done = in_ranks(train, 2, Task(models, tmp_path_factory.mktemp("runs") / "two"))[0]
    return done


def probes_of(run: Path) -> list[dict[str, Any]]:
    times = ("seconds", "device_seconds")
    return [{k: v for k, v in line.items() if k not in times} for line in read_records(RunFolder(run).held_out)]


class TestProbes:
    """All ranks measure, the first one writes, and what is trained does not notice."""

    def test_they_change_nothing_and_are_the_same_for_any_number_of_ranks(
        self, models: Path, straight: Done, tmp_path: Path
    ) -> None:
        one, two = Task(models, tmp_path / "one", probed=True), Task(models, tmp_path / "two", probed=True)
        train(ALONE, one)
        done = in_ranks(train, 2, replace(two, stop_after=3))[0]
        losses = done.losses
        done = in_ranks(train, 2, two)[0]
        assert losses + done.losses == straight.losses
        assert_equal(done.weights, straight.weights)
        wanted, got = probes_of(one.run), probes_of(two.run)
        assert [probe["step"] for probe in got] == [probe["step"] for probe in wanted] == list(range(9))
        for mine, theirs in zip(got, wanted, strict=True):
            for measure in ("loss", "teacher_loss", "kl"):
                assert mine["domains"]["text"][measure] == pytest.approx(theirs["domains"]["text"][measure], rel=1e-4)
            for layer, alone in zip(mine["layers"], theirs["layers"], strict=True):
                assert layer["half_life"] == pytest.approx(alone["half_life"], rel=1e-3)
                assert layer["state_norm"] == pytest.approx(alone["state_norm"], rel=1e-3)
        assert [sitting["devices"] for sitting in read_records(RunFolder(two.run).sittings)] == [2, 2]
        last = read_records(RunFolder(two.run).metrics)[-1]
        assert last["device_seconds"] == pytest.approx(2 * last["seconds"], abs=0.01)

    def test_in_bfloat16(self, models: Path, tmp_path: Path) -> None:
        recipe = replace(RECIPE, precision="bfloat16", steps=2)
        one = Task(models, tmp_path / "one", recipe=recipe, probed=True)
        train(ALONE, one)
        in_ranks(train, 2, replace(one, run=tmp_path / "two"))
        for mine, theirs in zip(probes_of(tmp_path / "two"), probes_of(one.run), strict=True):
            assert mine["domains"]["text"]["loss"] == pytest.approx(theirs["domains"]["text"]["loss"], rel=0.01)
            assert len(mine["layers"]) == len(theirs["layers"]) > 0


class TestNothingIsLost:
    """Whatever happens to a run of several ranks, it ends where the one that nothing happened to does."""

    def test_resumed_at_the_same_size_it_is_the_same_bit_for_bit(
        self, models: Path, straight: Done, tmp_path: Path
    ) -> None:
        task = Task(models, tmp_path)
        losses = []
        for stop in (3, 6, None):
            done = in_ranks(train, 2, replace(task, stop_after=stop))[0]
            losses += done.losses
            assert not stop or done.said == [f"Stopped after step {stop} of 8; everything is saved."]
        assert losses == straight.losses
        assert_equal(done.weights, straight.weights)

    def test_resumed_by_other_numbers_of_ranks(self, models: Path, alone: Done, tmp_path: Path) -> None:
        task = Task(models, tmp_path)
        losses = []
        for size, dp_replicate, stop in ((1, 1, 2), (2, 1, 3), (2, 2, 5), (4, 1, 6)):
            run = replace(task, stop_after=stop)
            done = in_ranks(train, size, run, dp_replicate=dp_replicate)[0] if size > 1 else train(ALONE, run)
            losses += done.losses
        losses += train(ALONE, task).losses
        assert_near(losses, alone.losses)

    @pytest.mark.parametrize("moment", ["_write_tensors", "_digests", "_finish"])
    def test_killed_while_saving_the_checkpoint_before_is_there(
        self, models: Path, straight: Done, tmp_path: Path, moment: str
    ) -> None:
        task = Task(models, tmp_path)
        in_ranks(train, 2, replace(task, stop_after=3))
        outcomes = start_ranks(train_until_killed, 2, replace(task, stop_after=6), moment)
        assert outcomes[0].exitcode == -signal.SIGKILL
        left = os.listdir(tmp_path / "checkpoints")
        assert [name for name in left if name.startswith("step")] == ["step-00000003"]
        assert any(name.startswith(".step-00000006-partial") for name in left)
        done = in_ranks(train, 2, task)[0]
        assert done.losses == straight.losses[3:]
        assert_equal(done.weights, straight.weights)

    def test_one_flipped_byte_is_found_and_the_last_good_one_taken(
        self, models: Path, straight: Done, tmp_path: Path
    ) -> None:
        task = Task(models, tmp_path)
        in_ranks(train, 2, replace(task, stop_after=6, checkpoint_seconds=0))
        damaged = tmp_path / "checkpoints" / "step-00000006" / "__1_0.distcp"
        content = bytearray(damaged.read_bytes())
        content[len(content) // 3] ^= 255
        damaged.write_bytes(content)
        done = in_ranks(train, 2, task)
        for each in done:
            assert each.said[0].startswith(f"The checkpoint {damaged.parent} is damaged: __1_0.distcp does not match")
            assert each.said[0].endswith("Continuing from step-00000005.")
            assert each.losses == straight.losses[5:]
        assert_equal(done[0].weights, straight.weights)

    def test_a_signal_to_one_rank_stops_all_after_the_same_step(
        self, models: Path, straight: Done, tmp_path: Path
    ) -> None:
        task = Task(models, tmp_path)
        stopped = in_ranks(train_signalled, 2, task)
        assert [each.said for each in stopped] == [["Stopped after step 5 of 8; everything is saved."]] * 2
        done = in_ranks(train, 2, task)[0]
        assert stopped[0].losses + done.losses == straight.losses
        assert_equal(done.weights, straight.weights)

    def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(self, models: Path, tmp_path: Path) -> None:
        done = in_ranks(train_faulty, 2, Task(models, tmp_path), (4,))
        assert done[0].weights.keys()
        lines = [json.loads(line) for line in RunFolder(tmp_path).metrics.read_text().splitlines()]
        assert [line["skipped"] for line in lines] == [0, 0, 0, 0, 1, 0, 0, 0]
        assert all(bool(value.isfinite().all()) for value in done[0].weights.values())

    def test_several_in_a_row_go_back_and_skip_the_data(self, models: Path, tmp_path: Path) -> None:
        """Data 4 to 8 are bad: the run goes back to step 3, and its step 3 reads the data of step 9."""
        task = Task(models, tmp_path / "faulty", recipe=replace(RECIPE, steps=12))
        in_ranks(train, 2, replace(task, stop_after=3))
        done = in_ranks(train_faulty, 2, task, range(4, 9))
        assert all(
            "not finite for 5 steps in a row, up to step 9: back to step 3, and" in each.said[0] for each in done
        )
        lines = [json.loads(line) for line in RunFolder(task.run).metrics.read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, 13))
        assert not any(line["skipped"] for line in lines)
        shifted = in_ranks(train_shifted, 2, replace(task, run=tmp_path / "shifted"), 3, 6)[0]
        assert_equal(done[0].weights, shifted.weights)

    def test_going_back_has_an_end(self, models: Path, tmp_path: Path) -> None:
        task = Task(models, tmp_path, recipe=replace(RECIPE, steps=100))
        in_ranks(train, 2, replace(task, stop_after=1))
        outcomes = start_ranks(train_faulty, 2, task, range(2, 10_000))
        assert all(
            "not finite for 5 steps in a row, up to step 6 for the 4th time: lower" in each.error for each in outcomes
        )
        assert os.listdir(tmp_path / "checkpoints") == ["step-00000001"]

    def test_a_full_disk_stops_all_and_keeps_what_was_saved(
        self, models: Path, straight: Done, disk_of: Callable[[int], Path], tmp_path: Path
    ) -> None:
        task = Task(models, disk_of(900) / "run")
        in_ranks(train, 2, replace(task, stop_after=5))
        outcomes = start_ranks(train, 2, replace(task, stop_after=7))
        assert all("OutputError: Could not write" in each.error for each in outcomes)
        assert os.listdir(task.run / "checkpoints") == ["step-00000005"]
        done = in_ranks(train, 2, replace(task, run=copied(task.run, tmp_path / "run")))[0]
        assert done.losses == straight.losses[5:]
        assert_equal(done.weights, straight.weights)


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def train_until_killed(ranks: Ranks, task: Task, moment: str) -> Done:
    """The first rank dies as it comes to one moment of saving; the other finds that out by itself."""
    if ranks.first:
        before = getattr(Checkpoints, moment)

        def die(*args: Any) -> Any:
            if moment == "_write_tensors":  # after its file was begun
                (args[1] / "__0_0.distcp").write_bytes(b"half")
            else:
                before(*args) if moment == "_digests" else None
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(Checkpoints, moment, die)
    return train(ranks, task)


def train_signalled(ranks: Ranks, task: Task) -> Done:
    def interrupt(progress: Progress) -> None:
        if progress.step == 5 and ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    return train(ranks, task, watch=interrupt)


class Faulty(Retraining):
    """Some data give the last rank a gradient that is no number."""

    bad: Sequence[int]

    def step(self, step: int) -> Metrics:
        self.now = step + self.data_shift
        return super().step(step)

    def _gradients(self, read: Any, stage: Any) -> Figures:
        figures = super()._gradients(read, stage)
        if self.now in type(self).bad and self.ranks.rank == self.ranks.size - 1:
            gradient = self.student.model.layers[0].self_attn.q_proj.weight.grad
            assert isinstance(gradient, DTensor)
            gradient.to_local()[0, 0] = torch.nan
        return figures


def train_faulty(ranks: Ranks, task: Task, bad: Sequence[int]) -> Done:
    Faulty.bad = bad
    return train(ranks, task, Faulty)


class Shifted(Retraining):
    """From some step on, reads later data."""

    first: int
    shift: int

    def step(self, step: int) -> Metrics:
        self.data_shift = self.shift if step >= self.first else 0
        return super().step(step)


def train_shifted(ranks: Ranks, task: Task, first: int, shift: int) -> Done:
    Shifted.first, Shifted.shift = first, shift
    return train(ranks, task, Shifted)


def leave(ranks: Ranks, notes: Path) -> None:
    def still_together() -> None:
        together = torch.tensor(ranks.rank)
        torch.distributed.all_reduce(together)
        (notes / str(ranks.rank)).write_text(str(int(together)))

    ranks.before_leaving.append(still_together)


def test_what_is_to_be_done_before_the_ranks_part_is_done_while_they_are_together(tmp_path: Path) -> None:
    in_ranks(leave, 2, tmp_path)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["1", "1"]


def largest_count(ranks: Ranks) -> int:
    return ranks.most(10 * (ranks.rank == 1) + 3)


def test_the_largest_of_counts_is_known_to_all() -> None:
    assert in_ranks(largest_count, 2) == [13, 13]
    assert ALONE.most(3) == 3
