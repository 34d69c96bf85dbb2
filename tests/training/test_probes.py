"""Probes on a real pretrained model: right by the definitions, and without a trace in the run they look at."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from power_retention.conversion.source import Source, open_source
from power_retention.conversion.swap import swap_attention
from power_retention.errors import ArgumentError, DataError
from power_retention.ops import power_retention
from power_retention.ops.layout import multiplicity
from power_retention.training.board import Board
from power_retention.training.domains import (
    Domain,
    TrainedOnShards,
    TrainedOnText,
    parse_held_out,
    read_domains,
    refuse_shards_of,
)
from power_retention.training.folder import RunFolder, read_records
from power_retention.training.mixture import Mixture, Phase, read_held_out
from power_retention.training.probes import OCTAVES, Probes, mixer_health, probe_steps
from power_retention.training.recipe import Recipe
from power_retention.training.retraining import Retraining
from power_retention.training.run import RunInterrupted, execute
from power_retention.training.sharding import make_shards
from power_retention.training.shards import open_shards
from power_retention.training.text import Tokens, hash_unit, read_documents, split_held_out, tokenize

RECIPE = Recipe(steps=6, align_share=0.5, batch=2, length=64, align_lr=4e-3, mixer_lr=2e-3, other_lr=1e-3)
LENGTH = 128


@pytest.fixture(scope="module")
def source(stories_dir: Path) -> Source:
    return open_source(stories_dir)


@pytest.fixture(scope="module")
def documents(stories_text: Path) -> list[str]:
    return read_documents([stories_text])


@pytest.fixture(scope="module")
def corpus(source: Source, documents: list[str]) -> Tokens:
    return tokenize(split_held_out(documents)[0], source.tokenizer)


@pytest.fixture(scope="module")
def domains(
    source: Source, documents: list[str], stories_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Domain]:
    """The run's own kind of text, and one it knows nothing of."""
    other = tmp_path_factory.mktemp("text") / "letters.txt"
    other.write_text("\n".join(chr(97 + i % 26) * (i % 7 + 1) for i in range(400)))
    trained_on = TrainedOnText(split_held_out(documents)[0])
    paths = {"stories": stories_text, "letters": other}
    return read_domains(paths, source.tokenizer, trained_on, windows=3, length=LENGTH)


@pytest.fixture
def new(source: Source, corpus: Tokens) -> Callable[..., Retraining]:
    def make(recipe: Recipe = RECIPE) -> Retraining:
        torch.manual_seed(0)
        student = swap_attention(copy.deepcopy(source.model))
        return Retraining(student, copy.deepcopy(source.model), corpus, recipe)

    return make


class TestDomains:
    def test_no_document_is_learnt_from(self, domains: list[Domain], documents: list[str], source: Source) -> None:
        stories, letters = domains
        assert (stories.kept_out, letters.kept_out) == (False, True)
        held_out = sorted(split_held_out(documents)[1], key=lambda document: hash_unit(document, 0))
        wanted = tokenize(held_out, source.tokenizer)
        assert stories.batches[0].ids.flatten().tolist() == wanted.ids[: 3 * LENGTH].tolist()
        borders = [start for start in wanted.starts.tolist() if start < 3 * LENGTH and start % LENGTH]
        assert set(borders) <= set(stories.batches[0].cu_seqlens.tolist())

    def test_of_text_that_is_all_learnt_from_nothing_is_left(
        self, source: Source, documents: list[str], stories_text: Path
    ) -> None:
        with pytest.raises(DataError, match="no document that the run does not learn from"):
            read_domains({"stories": stories_text}, source.tokenizer, TrainedOnText(documents))

    def test_beside_shards(
        self, source: Source, documents: list[str], stories_dir: Path, stories_text: Path, tmp_path: Path
    ) -> None:
        """Of the file that shards were made of, their left-out documents; the shards themselves are refused."""
        folder, everything = tmp_path / "most", tmp_path / "all"
        make_shards([str(stories_text)], str(stories_dir), folder, held_out=0.1)
        make_shards([str(stories_text)], str(stories_dir), everything, held_out=0.0)
        mixture = Mixture({"tales": open_shards(folder)}, [Phase({"tales": 1.0})])
        trained_on = TrainedOnShards(mixture)
        (domain,) = read_domains({"x": stories_text}, source.tokenizer, trained_on, windows=99, length=LENGTH)
        assert not domain.kept_out
        left_out = [document for document in documents if hash_unit(document, 0) < 0.1]
        tokens = len(tokenize(left_out, source.tokenizer))
        assert sum(batch.ids.numel() for batch in domain.batches) == tokens // LENGTH * LENGTH
        with pytest.raises(DataError, match="are the very ones the mixture learns from as 'tales'"):
            read_domains({"x": folder}, source.tokenizer, trained_on)
        with pytest.raises(DataError, match=f"were made of {stories_text.resolve()}, which the run learns from"):
            read_domains({"x": everything}, source.tokenizer, trained_on)
        copied, other = shutil.copy(stories_text, tmp_path / "copied.jsonl"), tmp_path / "other.txt"
        make_shards([str(copied)], str(stories_dir), tmp_path / "copy", held_out=0.1)
        with pytest.raises(DataError, match="are the very ones the mixture learns from as 'tales'"):
            read_domains({"x": tmp_path / "copy"}, source.tokenizer, trained_on)
        other.write_text("Something else. " * 300)
        make_shards([str(other)], str(stories_dir), tmp_path / "other", held_out=0.0)
        (shards,) = read_domains({"x": tmp_path / "other"}, source.tokenizer, trained_on, windows=3, length=LENGTH)
        assert shards.kept_out
        (named,) = read_domains({"tales": tmp_path / "other"}, source.tokenizer, trained_on, windows=3, length=LENGTH)
        assert not named.kept_out
        whole = Mixture({"all": open_shards(everything)}, [Phase({"all": 1.0})])
        with pytest.raises(DataError, match="no document that the run does not learn from"):
            read_domains({"x": stories_text}, source.tokenizer, TrainedOnShards(whole))

    def test_a_single_shard_that_is_learnt_from(
        self, source: Source, stories_dir: Path, stories_text: Path, tmp_path: Path
    ) -> None:
        copied = shutil.copy(stories_text, tmp_path / "copied.jsonl")
        more = tmp_path / "more.txt"
        more.write_text("A last one.")
        size = stories_text.stat().st_size
        for name, files in (("one", [stories_text]), ("two", [copied, more])):
            make_shards(list(map(str, files)), str(stories_dir), tmp_path / name, held_out=0.0, shard_bytes=size)
        trained_on = TrainedOnShards(Mixture({"one": open_shards(tmp_path / "one")}, [Phase({"one": 1.0})]))
        with pytest.raises(DataError, match=r"shard-00000\.bin is the same as one that the mixture learns from"):
            read_domains({"x": tmp_path / "two"}, source.tokenizer, trained_on)

    def test_shards_of_the_run_s_own_text(self, stories_dir: Path, stories_text: Path, tmp_path: Path) -> None:
        make_shards([str(stories_text)], str(stories_dir), tmp_path / "s")
        held_out = {"text": stories_text, "x": tmp_path / "s"}
        for text in (stories_text, stories_text.parent):
            with pytest.raises(DataError, match=r"The held-out shards 'x' were made of .* which the run learns from"):
                refuse_shards_of(held_out, [text])
        other = tmp_path / "other.txt"
        other.write_text("Something else.")
        refuse_shards_of(held_out, [other])

    def test_windows_of_shards_are_spread(
        self, source: Source, stories_dir: Path, stories_text: Path, tmp_path: Path
    ) -> None:
        make_shards([str(stories_text)], str(stories_dir), tmp_path / "s", held_out=0.0)
        tokens = open_shards(tmp_path / "s")
        (domain,) = read_domains({"x": tmp_path / "s"}, source.tokenizer, TrainedOnText([]), windows=3, length=LENGTH)
        ids = domain.batches[0].ids
        for row, start in zip(ids, (0, (len(tokens) - LENGTH) // 2, len(tokens) - LENGTH), strict=True):
            assert row.tolist() == tokens.read(start, start + LENGTH)[0].tolist()

    def test_what_cannot_be_read(self, source: Source, tmp_path: Path) -> None:
        short = tmp_path / "short.txt"
        short.write_text("Once.")
        for path, message in ((tmp_path / "nowhere", "does not exist"), (short, "tokens and one window takes 512")):
            with pytest.raises(DataError, match=message):
                read_domains({"x": path}, source.tokenizer, TrainedOnText([]))
        with pytest.raises(ArgumentError, match="at least 1 window of at least 2 tokens"):
            read_domains({"x": short}, source.tokenizer, TrainedOnText([]), windows=0)

    def test_names(self) -> None:
        assert parse_held_out(["a=x/y", "b = z=1"]) == {"a": Path("x/y"), "b": Path("z=1")}
        for given in (["a"], ["=x"], ["a="], ["a=x", "a=y"]):
            with pytest.raises(ArgumentError, match=r"NAME=PATH|given twice"):
                parse_held_out(given)

    def test_the_table_of_a_mixture(self, tmp_path: Path) -> None:
        file = tmp_path / "mixture.toml"
        text = '[sources]\na = "s"\n[[phase]]\nweights = { a = 1 }\n'
        file.write_text(f'{text}[held_out]\ncode = "text/code.jsonl"\n')
        assert read_held_out(file) == {"code": tmp_path / "text/code.jsonl"}
        assert read_held_out(tmp_path) == {}
        file.write_text(f"{text}[held_out]\ncode = 3\n")
        with pytest.raises(DataError, match=r"\[held_out\] that does not give each name"):
            read_held_out(file)


def test_when_to_probe() -> None:
    recipe = Recipe(steps=100, align_share=0.33)
    assert probe_steps(recipe, every=40) == {0, 33, 40, 80, 100}
    assert probe_steps(recipe) == {*range(0, 101, 5), 33}
    assert probe_steps(Recipe(steps=1)) == {0, 1}
    with pytest.raises(ArgumentError, match="Probes every 0 steps"):
        probe_steps(recipe, every=0)


def by_definition(retraining: Retraining, domain: Domain) -> dict[str, Tensor]:
    """Loss, teacher's loss, KL and agreement at every labelled token, each document read alone with full logits."""
    rows: list[Tensor] = []
    for batch in domain.batches:
        for start, stop in pairwise(batch.cu_seqlens.tolist()):
            ids, labels = batch.ids.flatten()[None, start:stop], batch.labels.flatten()[start:stop]
            with torch.no_grad():
                student, teacher = (
                    model.eval()(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
                    for model in (retraining.student, retraining.teacher)
                )
            for at in (labels >= 0).nonzero().flatten().tolist():
                kl = (teacher[at].exp() * (teacher[at] - student[at])).sum()
                agrees = student[at].argmax() == teacher[at].argmax()
                losses = -student[at, labels[at]], -teacher[at, labels[at]]
                rows.append(torch.stack([*losses, kl, agrees.double(), torch.tensor(at).double()]))
    names = ("loss", "teacher_loss", "kl", "agreement", "context")
    return dict(zip(names, torch.stack(rows).unbind(-1), strict=True))


def test_a_probe_measures_what_it_says(new: Callable[..., Retraining], domains: list[Domain]) -> None:
    retraining = new()
    probe = Probes(retraining, domains).measure()
    assert list(probe["domains"]) == ["stories", "letters"]
    for domain in domains:
        got, wanted = probe["domains"][domain.name], by_definition(retraining, domain)
        assert got["tokens"] == len(wanted["loss"])
        assert got["kept_out"] == domain.kept_out
        for name in ("loss", "teacher_loss", "kl", "agreement"):
            assert got[name] == pytest.approx(float(wanted[name].mean()), rel=1e-4), name
        assert got["kl"] > 0.5
        assert got["agreement"] < 0.9
        positions = got["by_position"]
        assert sum(positions["tokens"]) == got["tokens"]
        for octave, count in enumerate(positions["tokens"]):
            low, high = (0, 1) if octave == 0 else (1 << (octave - 1), 1 << octave)
            inside = (wanted["context"] >= low) & (wanted["context"] < high)
            assert int(inside.sum()) == count
            for name in ("loss", "teacher_loss", "kl"):
                if count:
                    assert positions[name][octave] == pytest.approx(
                        float(wanted[name][inside].mean()), rel=1e-4, abs=1e-6
                    )
                else:
                    assert positions[name][octave] is None


def test_the_teacher_beside_itself(source: Source, corpus: Tokens, domains: list[Domain]) -> None:
    """A student that computes the teacher's softmax: no divergence, full agreement, no gates to look at."""
    student = swap_attention(copy.deepcopy(source.model))
    for mixer in student.mixers:
        mixer.softmax = True
    probe = Probes(Retraining(student, copy.deepcopy(source.model), corpus, RECIPE), domains).measure()
    for domain in probe["domains"].values():
        assert abs(domain["kl"]) < 1e-5
        assert domain["agreement"] > 0.999
        assert domain["loss"] == pytest.approx(domain["teacher_loss"], rel=1e-5)
    assert probe["layers"] == []


@pytest.mark.parametrize("p", [2, 4])
def test_health_by_its_definition(source: Source, p: int) -> None:
    """Norms from the state itself, normalisers from the weights, half-lives from the gates."""
    torch.manual_seed(1)
    student = swap_attention(copy.deepcopy(source.model), p=p, key_bias=True).eval()
    for mixer in student.mixers:
        torch.nn.init.normal_(mixer.g_proj.bias, mean=3.0)
        torch.nn.init.normal_(mixer.g_proj.weight, std=0.3)
        torch.nn.init.normal_(mixer.k_bias, std=0.5)
    ids = torch.randint(3, 500, (2, 40))
    inputs: list[tuple[Any, ...]] = []
    hooks = [m.register_forward_hook(lambda _, args, __: inputs.append(args)) for m in student.mixers]
    health = mixer_health(student, ids)
    for hook in hooks:
        hook.remove()
    assert len(health) == len(student.mixers) == len(inputs)
    for mixer, (x, positions), got in zip(student.mixers, inputs, health, strict=True):
        with torch.no_grad():
            q, k = mixer.queries_and_keys(x, *positions)
            k, v = k + mixer.k_bias, mixer.v_proj(x).unflatten(-1, (-1, mixer.head_dim))
            log_g = mixer.log_gates(x)
            scaled = k * mixer.head_dim**-0.25
            _, state = power_retention(q, scaled, v, log_g, p=p, return_state=True)
            # The layout holds each monomial once; the norm counts it as often as it occurs in a power of an inner product.
            squared = (state.memory.square().sum(-1) * multiplicity(mixer.head_dim, p, state.memory)).sum(-1)
            weights = (torch.einsum("bihrd,bjhd->bhrij", q.unflatten(2, (k.shape[2], -1)), k)) ** p
            most = (q.norm(dim=-1).unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1)[..., None]) ** p
            most = most * k.norm(dim=-1).transpose(1, 2)[:, :, None, None] ** p
            cumulative = log_g.cumsum(1).transpose(1, 2)[:, :, None]
            decay = (cumulative[..., :, None] - cumulative[..., None, :]).exp().tril()
            shares = (weights * decay).sum(-1) / (most * decay).sum(-1)
            half_lives = math.log(2) / -log_g
        assert got["state_norm"] == pytest.approx([float(squared.sqrt().mean()), float(squared.sqrt().max())], rel=1e-3)
        assert got["smallest_normalizer"] == pytest.approx(float(shares.min()), rel=1e-3)
        assert got["half_life"] == pytest.approx(half_lives.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist(), rel=1e-3)
        counts = [int(((half_lives >= 2**i) & (half_lives < 2 ** (i + 1))).sum()) for i in range(1, OCTAVES - 1)]
        assert got["octaves"][1:-1] == counts
        assert sum(got["octaves"]) == half_lives.numel()


def trained(retraining: Retraining) -> dict[str, Tensor]:
    state = dict(retraining.student.state_dict())
    for name, parameter in retraining.student.named_parameters():
        for key, value in retraining.optimizer.state[parameter].items():
            state[f"{name} {key}"] = value
    return state


def without_times(path: Path) -> list[dict[str, Any]]:
    times = ("seconds", "device_seconds", "tokens_per_second")
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in times} for line in lines]


def begun(path: Path) -> RunFolder:
    folder = RunFolder(path)
    folder.begin(RECIPE, {})
    return folder


class TestRuns:
    @pytest.fixture
    def watched(
        self, new: Callable[..., Retraining], domains: list[Domain], tmp_path: Path
    ) -> tuple[Retraining, RunFolder]:
        retraining, folder = new(), begun(tmp_path / "watched")
        execute(retraining, folder, probes=Probes(retraining, domains, every=2))
        return retraining, folder

    def test_a_run_that_is_watched_ends_the_same(
        self, watched: tuple[Retraining, RunFolder], new: Callable[..., Retraining], tmp_path: Path
    ) -> None:
        alone = new()
        execute(alone, begun(tmp_path / "alone"))
        got, wanted = trained(watched[0]), trained(alone)
        assert got.keys() == wanted.keys()
        assert all(value.equal(wanted[name]) for name, value in got.items())
        assert watched[0].student.training
        assert without_times(watched[1].metrics) == without_times(tmp_path / "alone" / "metrics.jsonl")
        assert not (tmp_path / "alone" / "held_out.jsonl").exists()

    def test_its_records(self, watched: tuple[Retraining, RunFolder], domains: list[Domain]) -> None:
        retraining, folder = watched
        probes = read_records(folder.held_out)
        assert [probe["step"] for probe in probes] == [0, 2, 3, 4, 6]
        assert [probe["tokens"] for probe in probes] == [128 * probe["step"] for probe in probes]
        last, again = probes[-1], json.loads(json.dumps(Probes(retraining, domains).measure()))
        assert (last["domains"], last["layers"]) == (again["domains"], again["layers"])
        stories = [probe["domains"]["stories"] for probe in probes]
        assert stories[-1]["kl"] < stories[0]["kl"]
        assert len({domain["teacher_loss"] for domain in stories}) == 1
        assert all(len(probe["layers"]) == 5 for probe in probes)
        spent = [(probe["step"], probe["seconds"]) for probe in (*read_records(folder.metrics), *probes)]
        assert sorted(spent) == sorted(spent, key=lambda item: item[1])
        (sitting,) = read_records(folder.sittings)
        assert (sitting["step"], sitting["kind"], sitting["devices"]) == (0, "cpu", 1)

    @pytest.mark.parametrize("stops", [[2], [3], [1, 5]], ids=str)
    def test_stopped_and_resumed_it_has_the_same_records(
        self,
        watched: tuple[Retraining, RunFolder],
        new: Callable[..., Retraining],
        domains: list[Domain],
        tmp_path: Path,
        stops: list[int],
    ) -> None:
        folder = begun(tmp_path / "stopped")
        spent = 0.0
        for stop in [*stops, None]:
            retraining = new()
            probes = Probes(retraining, domains, every=2)
            if stop is None:
                execute(retraining, folder, probes=probes)
            else:
                with pytest.raises(RunInterrupted):
                    execute(retraining, folder, probes=probes, stop_after=stop)
            assert folder.seconds()[0] > spent
            spent = folder.seconds()[0]
        assert without_times(folder.held_out) == without_times(watched[1].held_out)
        assert without_times(folder.metrics) == without_times(watched[1].metrics)
        assert [sitting["step"] for sitting in read_records(folder.sittings)] == [0, *stops]

    def test_what_a_kill_left_behind_is_measured_again(
        self,
        watched: tuple[Retraining, RunFolder],
        new: Callable[..., Retraining],
        domains: list[Domain],
        tmp_path: Path,
    ) -> None:
        """Records of steps after the last checkpoint, the last of them cut off; their time stays spent."""
        folder = begun(tmp_path / "killed")
        with pytest.raises(RunInterrupted):
            execute(new(), folder, stop_after=3)
        records = watched[1].held_out.read_text().splitlines(keepends=True)
        folder.held_out.write_text("".join(records)[:-30])
        lost = {"step": 5, "seconds": 1000.0, "device_seconds": 2000.0}
        folder.metrics.write_text(folder.metrics.read_text() + json.dumps(lost) + "\n" + '{"step": 6, "sec')
        retraining = new()
        execute(retraining, folder, probes=Probes(retraining, domains, every=2))
        assert without_times(folder.held_out) == without_times(watched[1].held_out)
        seconds, device_seconds = folder.seconds()
        assert (seconds > 1000, device_seconds > 2000) == (True, True)

    def test_bfloat16(self, new: Callable[..., Retraining], domains: list[Domain]) -> None:
        low, high = (Probes(new(replace(RECIPE, precision=x)), domains).measure() for x in ("bfloat16", "float32"))
        for name, domain in high["domains"].items():
            assert low["domains"][name]["kl"] != domain["kl"]
            assert low["domains"][name]["kl"] == pytest.approx(domain["kl"], rel=0.05)
            assert low["domains"][name]["teacher_loss"] == pytest.approx(domain["teacher_loss"], rel=0.02)
        for got, wanted in zip(low["layers"], high["layers"], strict=True):
            assert got["state_norm"] == pytest.approx(wanted["state_norm"], rel=0.1)

    def test_what_is_not_finite_is_null(
        self, new: Callable[..., Retraining], domains: list[Domain], tmp_path: Path
    ) -> None:
        retraining = new(replace(RECIPE, steps=1))
        with torch.no_grad():
            retraining.student.model.norm.weight[0] = math.nan
        folder = begun(tmp_path)
        execute(retraining, folder, probes=Probes(retraining, domains))
        first = without_times(folder.held_out)[0]
        assert first["domains"]["stories"]["kl"] is None
        assert first["domains"]["stories"]["teacher_loss"] > 1


def test_tensorboard_shows_the_records(new: Callable[..., Retraining], domains: list[Domain], tmp_path: Path) -> None:
    """Every number as recorded, by tokens, also after steps were taken again."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = begun(tmp_path)
    for stop in (3, None):
        retraining = new()
        probes = Probes(retraining, domains, every=2)
        with Board(folder.path / "tensorboard") as listen:
            if stop is None:
                execute(retraining, folder, probes=probes, listen=listen)
            else:
                with pytest.raises(RunInterrupted):
                    execute(retraining, folder, probes=probes, listen=listen, stop_after=stop)
    events = EventAccumulator(str(folder.path / "tensorboard")).Reload()

    def curve(tag: str) -> list[tuple[int, float]]:
        return [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(tag)]

    probes_made, steps = read_records(folder.held_out), read_records(folder.metrics)
    assert curve("kl/letters") == [(probe["tokens"], probe["domains"]["letters"]["kl"]) for probe in probes_made]
    assert curve("training/kl") == [(step["tokens"], step["kl"]) for step in steps if "kl" in step]
    assert curve("half_life/layer_04") == [
        (probe["tokens"], probe["layers"][4]["half_life"][1]) for probe in probes_made
    ]
    positions = [probe["domains"]["stories"]["by_position"]["loss"][3] for probe in probes_made]
    assert curve("loss_by_position/stories/from_4") == [
        (probe["tokens"], loss) for probe, loss in zip(probes_made, positions, strict=True)
    ]
    histogram = events.Histograms("half_lives_log2/layer_00")[-1].histogram_value
    assert sum(histogram.bucket) == sum(probes_made[-1]["layers"][0]["octaves"])
