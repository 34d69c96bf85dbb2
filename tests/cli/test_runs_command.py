"""``power-retention runs``: a table, a file, data for machines, and a page that is served until Ctrl-C."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from test_cli import COMMAND, ENVIRONMENT, Here, here  # noqa: F401 (a fixture)

from some_runs import HOSTILE, make_runs


@pytest.fixture(scope="module")
def folder(stories_dir: Path, stories_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiments")
    make_runs(folder, stories_dir, stories_text)
    return folder


def test_for_people_and_machines(here: Here, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    value = here("runs", folder, "--price", "2", "--json").json
    (aligned,) = [run for run in value["runs"] if run["name"] == "aligned"]
    assert aligned["dollars"] == pytest.approx(2 * aligned["device_hours"])
    file = tmp_path / "runs.html"
    result = here("runs", folder / "aligned", folder / HOSTILE, "--html", file)
    assert result.code == 0, result.err
    row = re.search(r"│ aligned +│ finished +│ +768 │.*│ +([\d.]+) │ +[+-]\d+% │ +([\d.]+) │ +[+-]\d+% │", result.out)
    assert row is not None, result.out
    kls = [aligned["summary"][side]["kl"] for side in ("learnt", "kept_out")]
    assert [float(cell) for cell in row.groups()] == pytest.approx(kls, abs=6e-4)
    assert "Page in" in result.out
    assert '<script type="application/json" id="data">{"runs": [{"name": "aligned"' in file.read_text()
    monkeypatch.chdir(folder)
    assert {run["name"] for run in here("runs", "--json").json["runs"]} == {"aligned", HOSTILE}
    monkeypatch.chdir(tmp_path)
    assert "No runs here yet" in here("runs", "--html", file).err
    assert 'id="data">{"runs": []' in file.read_text()


def test_the_page_beside_json_and_an_unreadable_run(here: Here, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    shutil.copytree(folder, tmp_path / "own")
    (tmp_path / "own" / HOSTILE / "run" / "run.json").write_text("{")
    result = here("runs", tmp_path / "own", "--json", "--html", tmp_path / "runs.html")
    assert [run["name"] for run in result.json["runs"]] == ["aligned"]
    assert (
        '<script type="application/json" id="data">{"runs": [{"name": "aligned"' in (tmp_path / "runs.html").read_text()
    )
    assert result.err.count("unreadable: ") == 1


def test_help_and_refusals(here: Here, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    help_text = here("runs", "--help").out
    for words in ("power-retention runs experiments", "--html", "--price", "Ctrl-C"):
        assert words in help_text
    assert here.refusal("runs", tmp_path / "nowhere").startswith(
        f"{tmp_path / 'nowhere'} is no folder; give the outputs"
    )
    assert "at least 0 was expected" in here.refusal("runs", folder, "--price=-1")
    refused = here("runs", folder, "--port", "99999")
    assert refused.code == 1
    assert "error: Port 99999 cannot be served" in refused.err


def test_looking_at_runs_takes_no_torch() -> None:
    """Which takes seconds to load."""
    code = "import sys, power_retention.evaluation.runs.records; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_served_until_ctrl_c(folder: Path) -> None:
    with subprocess.Popen(
        [COMMAND, "runs", folder, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    ) as process:
        assert process.stdout is not None
        url = None
        for line in process.stdout:
            if found := re.search(r"http://127\.0\.0\.1:\d+/", line):
                url = found[0]
                break
        assert url is not None
        with urllib.request.urlopen(f"{url}data.json", timeout=20) as answer:
            assert {run["name"] for run in json.load(answer)["runs"]} == {"aligned", HOSTILE}
        process.send_signal(signal.SIGINT)
        try:
            _, err = process.communicate(timeout=20)
        finally:
            process.kill()  # nothing if it has ended; else it would be waited for without end
    assert process.returncode == 0
    assert err.splitlines()[-1:] == ["Ended."]
