from __future__ import annotations

from pathlib import Path

import pytest

from power_retention.errors import OutputError
from power_retention.evaluation.drawing import against_tokens, figure_file, short_count


def test_a_figure_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "figure.png"
    with figure_file(path, size=(2, 2)) as (_, axis):
        axis.plot([512, 1 << 20], [1, 2])
        against_tokens(axis, [512, 1 << 20])
        assert [label.get_text() for label in axis.get_xticklabels()] == ["512", "1M"]
    before = path.read_bytes()
    assert before.startswith(b"\x89PNG")
    with pytest.raises(ZeroDivisionError), figure_file(path, size=(2, 2)):
        _ = 1 / 0
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_its_ending_says_what_is_written(tmp_path: Path) -> None:
    with figure_file(tmp_path / "figure.svg", size=(2, 2)):
        pass
    assert b"<svg" in (tmp_path / "figure.svg").read_bytes()


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with (
        pytest.raises(OutputError, match=r"file/figure\.png"),
        figure_file(tmp_path / "file" / "figure.png", size=(2, 2)),
    ):
        pass


@pytest.mark.parametrize(
    ("tokens", "shown"), [(0, "0"), (512, "512"), (1024, "1k"), (1536, "1.5k"), (262144, "256k"), (1 << 20, "1M")]
)
def test_short_counts(tokens: int, shown: str) -> None:
    assert short_count(tokens) == shown
