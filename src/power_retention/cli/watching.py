"""What ``retrain`` measures while it trains, from its options to the table at its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from power_retention.cli.display import progress_bar, results, status, table

if TYPE_CHECKING:
    from power_retention.conversion.source import Source
    from power_retention.training.folder import RunFolder
    from power_retention.training.mixture import Mixture
    from power_retention.training.parallel import Ranks
    from power_retention.training.probes import Probes
    from power_retention.training.retraining import Retraining

HELD_OUT, PROBES = "held out", "probes"
NOTES = (HELD_OUT, PROBES)
"""What a run notes beside its inputs: it may be watched in another way, or not at all, and is still the same run."""


@dataclass(frozen=True)
class Watching:
    """What to measure a run on, and when.

    Attributes:
        held_out: text or shards by name.
        every: tokens between probes; None for a twentieth of the run.
        windows, length: of each name.
        fingerprints: what the held-out text was when the run began, by name.
    """

    held_out: dict[str, Path]
    every: int | None
    windows: int
    length: int
    fingerprints: dict[str, str]

    @classmethod
    def of(cls, held_out: Sequence[str], data: Path | None, every: str | None, windows: int, length: int) -> Watching:
        """From options; those of a mixture's file come first."""
        from power_retention.evaluation.plan import parse_count
        from power_retention.training.domains import parse_held_out
        from power_retention.training.mixture import read_held_out

        paths = (read_held_out(data) if data else {}) | parse_held_out(held_out)
        return cls(paths, parse_count(every) if every else None, windows, length, {})

    @classmethod
    def noted(cls, inputs: dict[str, Any]) -> Watching | None:
        """As noted when the run began; None if it was to be measured on nothing."""
        if HELD_OUT not in inputs:
            return None
        held_out = inputs[HELD_OUT]
        return cls(
            {name: Path(noted["path"]) for name, noted in held_out.items()},
            **inputs[PROBES],
            fingerprints={name: noted["fingerprint"] for name, noted in held_out.items()},
        )

    def probes(
        self,
        retraining: Retraining,
        source: Source,
        mixture: Mixture | None,
        documents: Sequence[str],
        text_field: str,
    ) -> Probes | None:
        """The probes of a run; None if there is nothing to measure it on."""
        from power_retention.training.domains import TrainedOnShards, TrainedOnText, read_domains
        from power_retention.training.probes import Probes

        if not self.held_out:
            return None
        trained_on = TrainedOnShards(mixture) if mixture else TrainedOnText(documents)
        length = min(self.length, retraining.student.config.max_position_embeddings)
        with status.status("Tokenizing held-out text"):
            domains = read_domains(
                self.held_out, source.tokenizer, trained_on, windows=self.windows, length=length, text_field=text_field
            )
        self._check_unchanged({domain.name: domain.fingerprint for domain in domains})
        every = self.every and -(-self.every // retraining.recipe.tokens_per_step)
        with progress_bar("The teacher reads held-out text") as update:
            return Probes(retraining, domains, every=every, progress=update)

    def notes(self, probes: Probes | None) -> dict[str, Any]:
        """To find the same text again when the run is resumed, and to say what it was measured on."""
        if probes is None:
            return {}
        held_out = {
            domain.name: {
                "path": str(self.held_out[domain.name].resolve()),
                "fingerprint": domain.fingerprint,
                "kept_out": domain.kept_out,
            }
            for domain in probes.domains
        }
        return {HELD_OUT: held_out, PROBES: {"every": self.every, "windows": self.windows, "length": self.length}}

    def _check_unchanged(self, found: dict[str, str]) -> None:
        from power_retention.errors import DataError

        for name, fingerprint in self.fingerprints.items():
            if found[name] != fingerprint:
                raise DataError(
                    f"The held-out text {name!r} ({self.held_out[name]}) is not what it was when the run began: put it "
                    "back, or start a new run."
                )


def open_board(folder: RunFolder, ranks: Ranks) -> AbstractContextManager[Callable[[dict[str, Any]], None] | None]:
    """A TensorBoard of the run's records, closed at the end; where it is not installed, a remark at the first of them."""
    from power_retention.training.board import Board, has_tensorboard

    if not ranks.first:
        return nullcontext()
    if has_tensorboard():
        return Board(folder.path / "tensorboard")
    said = False

    def say_once(record: dict[str, Any]) -> None:
        nonlocal said
        if not said:
            status.print(
                f"TensorBoard is not installed (pip install 'power-retention[watch]'): records go to {folder.path} alone.",
                markup=False,
                soft_wrap=True,
                highlight=False,
            )
        said = True

    return nullcontext(say_once)


def last_record(folder: RunFolder) -> dict[str, Any] | None:
    """The last probe of a run."""
    from power_retention.training.folder import read_records

    records = read_records(folder.held_out)
    return records[-1] if records else None


def show_held_out(folder: RunFolder) -> None:
    """A table of the first and the last probe."""
    from power_retention.training.folder import read_records

    records = read_records(folder.held_out)
    if not records:
        return
    first, last = records[0]["domains"], records[-1]["domains"]
    rows = [
        [
            escape(name) + (" *" if now["kept_out"] else ""),
            f"{now['teacher_loss']:.3f}",
            f"{_number(first.get(name, {}).get('loss'))} → {_number(now['loss'])}",
            _share(now["loss"], now["teacher_loss"]),
            f"{_number(first.get(name, {}).get('kl'))} → {_number(now['kl'])}",
            f"{now['agreement']:.1%}",
        ]
        for name, now in last.items()
    ]
    title = f"Held out, after {records[-1]['tokens']:,} tokens, nats a token"
    table(title, ["text", "teacher", "student", "above", "KL", "agree"], rows)
    if any(now["kept_out"] for now in last.values()):
        results.print("* kept out: no text of this kind is learnt from", highlight=False)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _share(loss: float | None, teacher: float) -> str:
    return "–" if loss is None else f"{loss / teacher - 1:+.1%}"
