"""The model card: what a model is, what it keeps, and what it recovered of its parent, from the records beside its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from power_retention.errors import SourceError
from power_retention.files import clear_write_errors, replacement
from power_retention.models.configuration import PowerRetentionConfig
from power_retention.models.sizes import count_parameters, kv_bytes_per_token, state_bytes

CARD = "README.md"
EVALUATION = Path("evaluation") / "evaluation.json"
"""Where ``power-retention evaluate`` leaves its report, inside a model's folder."""

_TITLE = "# A language model whose memory does not grow"
_TEMPLATE = "has been automatically generated"
"""A card that says so is the library's, and no loss."""


def write_card(config: PowerRetentionConfig, out: Path, *, records: Path | None = None) -> Path:
    """Write ``out/README.md``, unless a card that somebody wrote is there.

    Args:
        config: of the model.
        out: the folder of the card.
        records: the model's folder, if it has one: with :data:`EVALUATION` in it the card has the recovery table.

    Returns:
        The card's path.

    Raises:
        SourceError: the evaluation report is damaged.
    """
    path = out / CARD
    if path.exists() and not (is_ours(path) or _TEMPLATE in path.read_text(encoding="utf-8")):
        return path
    text = model_card(config, _read_report(records / EVALUATION) if records else None)
    with clear_write_errors(path), replacement(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def is_ours(path: Path) -> bool:
    """Whether a card is one that :func:`write_card` wrote."""
    return _TITLE in path.read_text(encoding="utf-8")


def model_card(config: PowerRetentionConfig, evaluation: dict[str, Any] | None = None) -> str:
    """The card's text: metadata for the hub, then Markdown."""
    parent = (config.parent or {}).get("name")
    base_model = parent if parent and parent.count("/") == 1 else None
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["power-retention", "linear-attention"],
        base_model=base_model,
    )
    sections = [f"---\n{data.to_yaml()}\n---", _introduction(config, parent), _USE]
    if evaluation:
        sections += [_recovery(evaluation), _benchmarks(evaluation), _decoding(evaluation)]
    return "\n\n".join(section for section in sections if section) + "\n"


_USE = """## Use

```python
import power_retention.models  # registers the model with the Auto classes; no trust_remote_code
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("…"), AutoTokenizer.from_pretrained("…")
```"""


def _introduction(config: PowerRetentionConfig, parent: str | None) -> str:
    origin = f"Converted from {parent}. " if parent else ""
    sizes = f"{count_parameters(config) / 1e6:,.1f} million parameters"
    kept = ""
    if config.keeps_state:
        crossover = state_bytes(config) / kv_bytes_per_token(config)
        kept = (
            f" and a state of {state_bytes(config) / 1e6:,.1f} MB a sequence in float32, whatever the length; a key/value "
            f"cache in 16 bits would be larger from {crossover:,.0f} tokens on"
        )
    return (
        f"{_TITLE}\n\n{origin}Its token mixer is power retention (p = {config.power}) "
        f"instead of attention. It has {sizes}{kept}."
    )


def _recovery(evaluation: dict[str, Any]) -> str:
    losses = evaluation.get("losses") or {}
    if not losses:
        return ""
    held_out = evaluation.get("held_out") or {}
    rows = [
        f"| {name} | {loss['loss']:.3f} | {loss['kl']:.3f} | {loss['recovered']:.0%} |" for name, loss in losses.items()
    ]
    return "\n".join(
        (
            "## What it recovered of its parent",
            "",
            f"On {held_out.get('windows', '?')} held-out windows of {held_out.get('length', '?')} tokens; recovered is the "
            "share of the loss that the hard swap (bare mixers) cost.",
            "",
            "| model | loss, nats a token | KL from the teacher | recovered |",
            "|---|---|---|---|",
            *rows,
        )
    )


def _benchmarks(evaluation: dict[str, Any]) -> str:
    tasks = evaluation.get("tasks") or {}
    if not tasks:
        return ""
    rows = [
        "| "
        + " | ".join(
            (
                task["title"],
                f"{'in the question' if task['shots'] is None else task['shots']}, by {task['kind']}",
                f"{task['documents']:,}",
                f"{task['chance']:.1%}",
                _percent(task["scores"]["teacher"]),
                _percent(task["scores"].get("hard swap")),
                _percent(task["scores"]["student"]),
                _percent(task["recovered"]["student"]),
            )
        )
        + " |"
        for task in tasks.values()
    ]
    harnesses = sorted({task["harness"] for task in tasks.values()})
    return "\n".join(
        (
            "## Benchmarks",
            "",
            f"By {', '.join(harnesses)}, ± standard error. Recovered is (this model − chance) / (parent − chance), where the "
            "parent is clearly above chance.",
            "",
            "| benchmark | examples in the prompt | documents | chance | parent | hard swap | this model | recovered |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
        )
    )


def _percent(estimate: dict[str, float | None] | None) -> str:
    if estimate is None or estimate["value"] is None:
        return "–"
    error = estimate["error"]
    return f"{100 * estimate['value']:.1f}" + ("" if error is None else f" ± {100 * error:.1f}") + "%"


def _decoding(evaluation: dict[str, Any]) -> str:
    decode = evaluation.get("decode") or {}
    if not decode.get("teacher"):
        return ""
    rows = [
        f"| {slow['context']:,} | {slow['milliseconds']:.1f} | {fast['milliseconds']:.1f} | {slow['cache_mb']:,.1f} | "
        f"{fast['cache_mb']:,.1f} |"
        for slow, fast in zip(decode["teacher"], decode["student"], strict=True)
    ]
    return "\n".join(
        (
            "## What decoding costs",
            "",
            "| context, tokens | parent, ms a token | this model | parent's cache, MB | this model's state |",
            "|---|---|---|---|---|",
            *rows,
        )
    )


def _read_report(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for loss in report.get("losses", {}).values():
            float(loss["loss"]) + float(loss["kl"]) + float(loss["recovered"])
        _benchmarks(report)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{path} is damaged ({type(error).__name__}: {error}); evaluate the model again.") from error
    return report
