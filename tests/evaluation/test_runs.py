"""Runs read for comparison: everything as recorded, also while a run goes on."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from power_retention.errors import ArgumentError, CheckpointError, DataError
from power_retention.evaluation.runs.page import RunsServer, render_page
from power_retention.evaluation.runs.records import differences, find_runs, read_run, read_runs, thinned, usual_price
from power_retention.training.folder import RunFolder, read_records
from some_runs import ALIGNED, HOSTILE, PLAIN, evaluate_as_if, make_runs


@pytest.fixture(scope="module")
def folder(stories_dir: Path, stories_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiments")
    make_runs(folder, stories_dir, stories_text)
    return folder


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(folder, tmp_path / "experiments"))


def as_if_on(run: Path, **device: Any) -> None:
    sittings = RunFolder(run).sittings
    sittings.write_text(
        "".join(json.dumps(json.loads(line) | device) + "\n" for line in sittings.read_text().splitlines())
    )


class TestReading:
    def test_a_run_is_what_it_recorded(self, folder: Path) -> None:
        run, records = read_run(folder / "aligned" / "run"), RunFolder(folder / "aligned" / "run")
        metrics, probes = read_records(records.metrics), read_records(records.held_out)
        assert (run["state"], run["step"], run["steps"], run["tokens"]) == ("finished", 6, 6, 768)
        assert run["settings"] == ALIGNED.to_dict() | {
            "model": "/models/stories",
            "text": records.read_settings()[1]["text"],
        }
        assert run["probes"] == probes
        assert [stage["name"] for stage in run["stages"]] == ["align", "distil"]
        assert [stage["tokens"] for stage in run["stages"]] == [0, 3 * 128]
        assert run["stages"][1]["device_seconds"] == metrics[2]["device_seconds"]
        assert run["training"]["kl"] == [None] * 3 + [line["kl"] for line in metrics[3:]]
        assert run["training"]["alignment_error"] == [line["alignment_error"] for line in metrics[:3]] + [None] * 3
        assert run["device_hours"] == probes[-1]["device_seconds"] / 3600
        last = probes[-1]["domains"]
        assert run["summary"]["learnt"]["kl"] == last["stories"]["kl"]
        above = last["letters"]["loss"] / last["letters"]["teacher_loss"] - 1
        assert run["summary"]["kept_out"]["above"] == pytest.approx(above)

    def test_several(self, folder: Path) -> None:
        value = read_runs([folder])
        assert {run["name"] for run in value["runs"]} == {"aligned", HOSTILE}
        assert value["differences"] == ["steps", "align_share"]
        for paths in ([folder / "aligned", folder / HOSTILE], [folder / "aligned" / "run", folder, folder / HOSTILE]):
            assert {run["path"] for run in read_runs(paths)["runs"]} == {run["path"] for run in value["runs"]}
        json.dumps(value, allow_nan=False)

    def test_states(self, own: Path) -> None:
        path = own / HOSTILE / "run"
        assert read_run(path)["state"] == "running"
        for file in path.iterdir():
            os.utime(file, (0, 0))
        stopped = read_run(path)
        assert (stopped["state"], stopped["step"], stopped["steps"]) == ("stopped", 5, PLAIN.steps)

    def test_while_it_is_written(self, own: Path) -> None:
        """A line cut off, then a run of which nothing but its settings is there, then no run at all."""
        path = own / HOSTILE / "run"
        whole = read_run(path)
        for name in ("metrics.jsonl", "held_out.jsonl"):
            content = (path / name).read_text()
            (path / name).write_text(content[:-20])
        cut = read_run(path)
        assert cut["step"] == whole["step"] - 1
        assert cut["probes"] == whole["probes"][:-1]
        assert cut["training"]["kl"] == whole["training"]["kl"][:-1]
        for file in path.glob("*.jsonl"):
            file.unlink()
        begun = read_run(path)
        assert (begun["step"], begun["probes"], begun["summary"], begun["device_hours"]) == (0, [], None, None)
        shutil.rmtree(own)
        own.mkdir()
        assert read_runs([own]) == {"runs": [], "differences": [], "unreadable": []}
        with pytest.raises(DataError, match="is no folder"):
            read_runs([own / "nowhere"])

    @pytest.mark.parametrize("content", ["{", "[]", '{"recipe": {"steps": 3}, "inputs": null}'])
    def test_an_unreadable_run_hides_no_other(self, own: Path, content: str) -> None:
        (own / HOSTILE / "run" / "run.json").write_text(content)
        value = read_runs([own])
        assert [run["name"] for run in value["runs"]] == ["aligned"]
        (sentence,) = value["unreadable"]
        assert str(own / HOSTILE / "run" / "run.json") in sentence
        for given in (own / HOSTILE, own / HOSTILE / "run"):
            with pytest.raises(CheckpointError, match=r"run\.json"):
                read_runs([own, given])

    def test_fine_tunings_are_passed_over(self, own: Path) -> None:
        (own / HOSTILE / "run" / "run.json").write_text('{"tuning": {}, "inputs": {}}')
        value = read_runs([own])
        assert ([run["name"] for run in value["runs"]], value["unreadable"]) == (["aligned"], [])
        with pytest.raises(DataError, match="is a run of `power-retention sft`"):
            read_runs([own / HOSTILE])

    def test_names_are_as_long_as_they_must_be(self, own: Path) -> None:
        shutil.copytree(own / "aligned", own / "again" / "aligned")
        (own / HOSTILE).rename(own / "x")
        names = {run["name"] for run in read_runs([own])["runs"]}
        assert names == {"experiments/aligned", "again/aligned", "experiments/x"}

    def test_folders_are_searched_some_way_down(self, own: Path, tmp_path: Path) -> None:
        deep = tmp_path / "a" / "b" / "c" / "d"
        shutil.copytree(own / "aligned", deep / "aligned")
        assert find_runs([tmp_path / "a"]) == []
        assert find_runs([tmp_path / "a" / "b"]) == [deep / "aligned" / "run"]


def test_tasks_of_the_result(own: Path) -> None:
    path = own / "aligned" / "run"
    assert read_run(path)["tasks"] == {}
    evaluate_as_if(path)
    report = own / "aligned" / "evaluation" / "evaluation.json"
    wanted = json.loads(report.read_text())["tasks"]["cloze"]
    got = read_run(path)["tasks"]["cloze"]
    assert (got["student"], got["recovered"]) == (wanted["scores"]["student"], wanted["recovered"]["student"])
    assert 0.5 < got["recovered"]["value"] < 1
    report.write_text('{"tasks": {"cloze": {}}}')
    with pytest.raises(DataError, match="evaluate the model again"):
        read_run(path)


class TestCosts:
    @pytest.mark.parametrize(
        ("device", "price"),
        [
            ("NVIDIA H200", 2.6),
            ("NVIDIA H100 80GB HBM3", 2.1),
            ("NVIDIA A100-SXM4-40GB", 1.6),
            ("NVIDIA GeForce RTX 4090", 0.4),
            ("AMD EPYC 9654", None),
            (None, None),
        ],
    )
    def test_usual_prices(self, device: str | None, price: float | None) -> None:
        assert usual_price(device) == price

    def test_dollars_are_hours_of_all_devices(self, own: Path) -> None:
        path = own / "aligned" / "run"
        assert read_run(path)["dollars"] is None
        as_if_on(path, device="NVIDIA H200", kind="cuda", devices=4)
        run = read_run(path)
        assert (run["devices"], run["kind"], run["price"]) == (4, "cuda", 2.6)
        assert run["dollars"] == run["device_hours"] * 2.6
        assert read_run(path, price=5.0)["dollars"] == run["device_hours"] * 5
        with pytest.raises(ArgumentError, match="The price is -1 dollars an hour"):
            read_runs([own], price=-1)


def test_curves_are_thinned_within_stages() -> None:
    metrics = [
        {
            "stage": "a" if i < 10 else "b",
            "tokens": i + 1,
            "device_seconds": 2.0 * i,
            "loss": float(i) if i != 3 else None,
        }
        for i in range(25)
    ]
    curves = thinned(metrics, points=7)
    assert curves["tokens"] == [4, 8, 10, 14, 18, 22, 25]
    assert curves["loss"] == [1.0, 5.5, 8.5, 11.5, 15.5, 19.5, 23.0]
    assert curves["device_seconds"] == [2.0 * (tokens - 1) for tokens in curves["tokens"]]
    assert curves["kl"] == [None] * 7
    assert thinned(metrics, points=100)["loss"] == [line["loss"] for line in metrics]
    assert thinned([])["loss"] == []


def test_differences() -> None:
    assert differences([{"a": 1, "b": [1]}, {"a": 1, "b": [2], "c": None}, {"a": 1, "b": [1]}]) == ["b"]
    assert differences([{"a": 1}, {}]) == ["a"]
    assert differences([{"a": 1}]) == []


def test_the_page_is_whole(folder: Path) -> None:
    """Nothing comes from elsewhere, and no name ends the data."""
    value = read_runs([folder])
    page = render_page(value)
    assert 'data-live="false"' in page
    assert re.findall(r"""(?:src|href|url|import)\s*[=(]\s*["']?(?!data:)[\w/.:]+""", page) == []
    assert set(re.findall(r"https?://[\w.]+", page)) <= {"http://www.w3.org"}  # the name of SVG
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert json.loads(data) == json.loads(json.dumps(value))
    assert "<b>" not in data


class TestServer:
    @pytest.fixture
    def server(self, own: Path) -> Iterator[RunsServer]:
        with RunsServer(lambda: read_runs([own])) as server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            yield server
            server.shutdown()
            thread.join()

    def ask(self, server: RunsServer, path: str, **headers: str) -> tuple[int, str, http.client.HTTPMessage]:
        connection = http.client.HTTPConnection(*server.server_address)  # type: ignore[arg-type]
        connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        body = answer.read().decode()
        connection.close()
        return answer.status, body, answer.headers

    def test_page_and_data(self, server: RunsServer, own: Path) -> None:
        assert server.server_address[0] == "127.0.0.1"
        status, page, headers = self.ask(server, "/")
        assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert 'data-live="true"' in page
        status, body, headers = self.ask(server, "/data.json")
        assert (status, json.loads(body)) == (200, json.loads(json.dumps(read_runs([own]))))
        assert self.ask(server, "/data.json", If_None_Match=headers["ETag"])[:2] == (304, "")
        shutil.rmtree(own / "aligned")
        status, body, _ = self.ask(server, "/data.json", If_None_Match=headers["ETag"])
        assert (status, len(json.loads(body)["runs"])) == (200, 1)

    def test_what_it_refuses(self, server: RunsServer, own: Path) -> None:
        assert self.ask(server, "/../../etc/passwd")[0] == 404
        assert self.ask(server, "/data.json", Host="evil.example:80")[0] == 403
        assert self.ask(server, "/data.json", Host=f"localhost:{server.server_address[1]}")[0] == 200
        shutil.rmtree(own)
        status, body, _ = self.ask(server, "/data.json")
        assert status == 503
        assert "is no folder" in body

    def test_a_port_that_is_taken(self, server: RunsServer) -> None:
        port = server.server_address[1]
        with pytest.raises(ArgumentError, match=f"Port {port} cannot be served .* choose another with --port"):
            RunsServer(lambda: {}, port)
        with pytest.raises(ArgumentError, match="Port 99999 cannot be served"):
            RunsServer(lambda: {}, 99999)
