"""Calibration, on a real pretrained model and real text."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from power_retention.conversion.calibrate import (
    HALF_LIVES,
    SCORE_TARGET,
    LayerReport,
    apply_calibration,
    attention_visited,
    calibrate_mixers,
    position_offsets,
    relative_error,
    save_calibration,
)
from power_retention.conversion.convert import calibration_windows, hard_swap
from power_retention.conversion.source import Source, open_source
from power_retention.conversion.swap import swap_attention
from power_retention.errors import StateError
from power_retention.evaluation.loss import held_out_loss
from power_retention.models import PowerRetentionForCausalLM
from power_retention.training.text import read_documents, tokenize
from tiny_models import tiny_parent, tokens

Calibrated = tuple[PowerRetentionForCausalLM, list[LayerReport]]


@pytest.fixture(scope="module")
def source(stories_dir: Path) -> Source:
    return open_source(stories_dir)


@pytest.fixture(scope="module")
def windows(source: Source, stories_text: Path) -> Tensor:
    """24 windows of 256 tokens: the first 16 to calibrate on."""
    ids = tokenize(read_documents([stories_text]), source.tokenizer).ids
    return calibration_windows(torch.from_numpy(ids).long(), count=24, length=256)


def calibrate(source: Source, windows: Tensor, **options: Any) -> Calibrated:
    student = swap_attention(copy.deepcopy(source.model), **options)
    return student, calibrate_mixers(student, source.model, windows[:16])


@pytest.fixture(scope="module")
def calibrated(source: Source, windows: Tensor) -> Calibrated:
    return calibrate(source, windows)


@pytest.fixture(scope="module")
def shifted(source: Source, windows: Tensor) -> Calibrated:
    """With key biases."""
    return calibrate(source, windows, key_bias=True)


@pytest.mark.parametrize("key_bias", [False, True])
def test_every_layer_comes_closer_to_its_attention(calibrated: Calibrated, shifted: Calibrated, key_bias: bool) -> None:
    _, reports = shifted if key_bias else calibrated
    assert [report.layer for report in reports] == [0, 1, 2, 3, 4]
    assert all(report.error_after < (0.85 if key_bias else 0.98) * report.error_before for report in reports)
    assert all(report.error_after < (0.9 if key_bias else 1) for report in reports), "hardly better than silence"
    for report in reports:
        assert (report.bias_fit is not None) == key_bias
        assert len(report.half_lives) == 4
        assert len(report.output_scales) == 8
        assert all(HALF_LIVES[0] <= value <= HALF_LIVES[1] for value in report.half_lives)
        assert all(value > 0 for value in report.output_scales)


def test_the_report_says_what_the_mixers_do(calibrated: Calibrated, source: Source, windows: Tensor) -> None:
    """Errors measured again, by another route, on the text and at the positions of the calibration."""
    student, reports = calibrated
    errors: list[float] = []

    def visit(index: int, x: Tensor, position_embeddings: tuple[Tensor, Tensor], wanted: Tensor) -> None:
        errors.append(relative_error(student.model.layers[index].self_attn(x, position_embeddings)[0], wanted))

    positions = torch.arange(256) + position_offsets(16, 512 - 256, seed=0)[:, None]
    with attention_visited(source.model, visit), torch.no_grad():
        source.model.model(input_ids=windows[:16], position_ids=positions, use_cache=False)
    assert errors == pytest.approx([report.error_after for report in reports], rel=1e-3)
    for report, layer in zip(reports, student.model.layers, strict=True):
        gates = torch.sigmoid(layer.self_attn.g_proj.bias)
        assert (gates ** torch.tensor(report.half_lives)).tolist() == pytest.approx([0.5] * 4, rel=1e-2)


def test_the_key_bias_shifts_scores_to_their_target(shifted: Calibrated, source: Source, windows: Tensor) -> None:
    student, reports = shifted
    assert all(report.bias_fit is not None and 0.5 < report.bias_fit <= 1 for report in reports)
    before, after = [], []

    def visit(index: int, x: Tensor, position_embeddings: tuple[Tensor, Tensor], wanted: Tensor) -> None:
        mixer = student.model.layers[index].self_attn
        q, k = mixer.queries_and_keys(x, *position_embeddings)
        for keys, means in ((k, before), (k + mixer.k_bias, after)):
            scores = torch.einsum("nihd,njhd->nhij", q, keys.repeat_interleave(2, 2)) / 8**0.5
            rows = (scores.tril().sum(-1) / torch.arange(1, 257))[..., 64:]
            means.append(float((rows - SCORE_TARGET).square().mean()))

    with attention_visited(source.model, visit), torch.no_grad():
        source.model.model(input_ids=windows[16:], use_cache=False)
    assert all(new < 0.4 * old for old, new in zip(before, after, strict=True)), (before, after)


@pytest.mark.parametrize("p", [2, 4])
def test_held_out_loss_falls(source: Source, windows: Tensor, p: int) -> None:
    """Against the same mixers uncalibrated: half of what they lost is back, on text that calibration has not seen.

    With key biases: without them this small model gains nothing before it is trained.  The hard swap is no yardstick
    here: its gates at ½ see a token or two, and this small model looks back a little more.
    """
    held_out, teacher = windows[16:], source.model
    uncalibrated = held_out_loss(swap_attention(copy.deepcopy(teacher), p=p), held_out, teacher=teacher)
    calibrated = held_out_loss(calibrate(source, windows, p=p, key_bias=True)[0], held_out, teacher=teacher)
    floor = held_out_loss(teacher, held_out).loss
    recovered = (uncalibrated.loss - calibrated.loss) / (uncalibrated.loss - floor)
    assert (0.3 if p == 2 else 0.45) < recovered < 0.9
    assert calibrated.kl < 0.7 * uncalibrated.kl
    if p == 4:
        assert calibrated.loss < held_out_loss(hard_swap(teacher, p), held_out).loss - 0.3


def test_another_models_attention_fits_worse(shifted: Calibrated, source: Source, windows: Tensor) -> None:
    """Negative control: the parent with its query heads in another order."""
    stranger = copy.deepcopy(source.model)
    with torch.no_grad():
        for layer in stranger.model.layers:
            layer.self_attn.q_proj.weight.copy_(layer.self_attn.q_proj.weight.flip(0))
    own = shifted[1]
    foreign = calibrate_mixers(swap_attention(copy.deepcopy(source.model), key_bias=True), stranger, windows[:16])
    assert sum(report.error_after for report in foreign) > 1.1 * sum(report.error_after for report in own)


@pytest.mark.parametrize("options", [{}, {"p": 4}, {"key_bias": True}], ids=["p = 2", "p = 4", "with a key bias"])
def test_the_file_reproduces_the_model_bit_for_bit(
    source: Source, windows: Tensor, tmp_path: Path, options: dict[str, Any]
) -> None:
    student, reports = calibrate(source, windows, **options)
    save_calibration(student, reports, tmp_path / "calibration.safetensors")
    again = swap_attention(copy.deepcopy(source.model), **options)
    apply_calibration(again, tmp_path / "calibration.safetensors")
    wanted = student.state_dict()
    assert all(value.equal(wanted[name]) for name, value in again.state_dict().items())
    assert (tmp_path / "calibration.safetensors").stat().st_size < 20_000


def test_calibrating_again_gives_the_same(calibrated: Calibrated, source: Source, windows: Tensor) -> None:
    student, reports = calibrated
    again, reports_again = calibrate(source, windows)
    assert reports_again == reports
    assert all(value.equal(student.state_dict()[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("key_bias", [False, True])
def test_only_what_it_says_is_written(
    calibrated: Calibrated, shifted: Calibrated, source: Source, key_bias: bool
) -> None:
    student, _ = shifted if key_bias else calibrated
    parent = source.model.state_dict()
    changed = {
        name for name, value in student.state_dict().items() if name not in parent or not value.equal(parent[name])
    }
    assert {name.rpartition("self_attn.")[2] for name in changed} == {
        "g_proj.weight",
        "g_proj.bias",
        "o_proj.weight",
        *["k_bias"] * key_bias,
    }


def test_without_gate_bias(source: Source, windows: Tensor) -> None:
    student = swap_attention(copy.deepcopy(source.model), gate_bias=False)
    reports = calibrate_mixers(student, source.model, windows[:4])
    assert all(report.half_lives == [] for report in reports)
    assert all(report.error_after < report.error_before for report in reports)


@pytest.mark.parametrize("kind", ["llama, every bias", "qwen2", "qwen3"])
def test_biased_and_normed_families(kind: str) -> None:
    parent = tiny_parent(kind)
    student = swap_attention(copy.deepcopy(parent), key_bias=True)
    reports = calibrate_mixers(student, parent, tokens(8, 128))
    assert all(report.error_after < report.error_before for report in reports)


def test_a_damaged_or_foreign_file_is_refused(calibrated: Calibrated, source: Source, tmp_path: Path) -> None:
    path = tmp_path / "calibration.safetensors"
    save_calibration(*calibrated, path)
    with pytest.raises(StateError, match="is not the calibration of this model, or is damaged"):
        apply_calibration(swap_attention(tiny_parent("llama")), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StateError, match="or is damaged"):
        apply_calibration(swap_attention(copy.deepcopy(source.model)), path)
    with pytest.raises(StateError, match="or is damaged"):
        apply_calibration(swap_attention(copy.deepcopy(source.model)), tmp_path / "nowhere")


def test_a_calibration_of_a_swap_with_other_biases_is_refused(
    calibrated: Calibrated, shifted: Calibrated, source: Source, tmp_path: Path
) -> None:
    """Output scales that were fitted beside a key bias are wrong without it."""
    for name, (made, missing) in {"plain": (calibrated, "0.k_bias"), "shifted": (shifted, "no 0.k_bias")}.items():
        path = tmp_path / name
        save_calibration(*made, path)
        with pytest.raises(StateError, match=missing):
            apply_calibration(swap_attention(copy.deepcopy(source.model), key_bias=name == "plain"), path)


def test_offsets_are_drawn_from_the_seed() -> None:
    offsets = position_offsets(1000, 9, seed=3)
    assert offsets.equal(position_offsets(1000, 9, seed=3))
    assert not offsets.equal(position_offsets(1000, 9, seed=4))
    assert set(offsets.tolist()) == set(range(10))
    assert not position_offsets(5, -3, seed=0).any()
