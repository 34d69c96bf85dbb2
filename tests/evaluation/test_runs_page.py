"""The page of runs in a real browser: what it draws is what was recorded, and it follows a run that goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from power_retention.evaluation.runs.page import RunsServer, render_page
from power_retention.evaluation.runs.records import read_runs
from power_retention.training.folder import RunFolder, read_records
from real_browser import find_browser, start_browser
from some_runs import HOSTILE, evaluate_as_if, make_runs


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    found = find_browser()
    if found is None:
        assert not os.environ.get("CI"), "CI must install chromium and chromedriver: see .ci/run"
        pytest.skip("needs chromium and chromedriver (Debian: chromium chromium-driver)")
    browser = start_browser(found, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def folder(stories_dir: Path, stories_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiments")
    evaluate_as_if(make_runs(folder, stories_dir, stories_text)[0])
    return folder


@pytest.fixture
def page(chrome: Chrome, folder: Path, tmp_path: Path) -> Iterator[Chrome]:
    """The page as a file, on its own."""
    file = tmp_path / "runs.html"
    file.write_text(render_page(read_runs([folder])), encoding="utf-8")
    chrome.get(file.as_uri())
    yield chrome
    assert chrome.get_log("browser") == []
    chrome.get("about:blank")


def card(page: Chrome, name: str) -> WebElement:
    (found,) = [each for each in page.find_elements(By.CLASS_NAME, "card") if each.get_attribute("data-chart") == name]
    return found


PATHS = """
return [...document.querySelectorAll('.card')].filter((card) => card.dataset.chart === arguments[0])
  .flatMap((card) => [...card.querySelectorAll('.curve')]).filter((line) => line.dataset.series === arguments[1])
  .map((line) => line.getAttribute('d')).join('')
"""


def curve(page: Chrome, chart: str, series: str) -> list[tuple[float, float]]:
    """The points of a drawn line, in pixels from the top left."""
    numbers = [float(number) for number in re.findall(r"[\d.]+", page.execute_script(PATHS, chart, series))]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def assert_drawn(points: list[tuple[float, float]], xs: list[float], ys: list[float]) -> None:
    """The points lie where the numbers do, on axes whose scale the first and the extreme ones give."""
    assert len(points) == len(xs) == len(ys)
    top, bottom = ys.index(max(ys)), ys.index(min(ys))
    assert xs[-1] > xs[0]
    for i, (x, y) in enumerate(points):
        wide, high = points[-1][0] - points[0][0], points[bottom][1] - points[top][1]
        assert wide > 50
        assert high > 20
        assert x == pytest.approx(points[0][0] + (xs[i] - xs[0]) / (xs[-1] - xs[0]) * wide, abs=0.3)
        assert y == pytest.approx(points[top][1] + (ys[top] - ys[i]) / (ys[top] - ys[bottom]) * high, abs=0.3)


def click(page: Chrome, selector: str) -> None:
    page.execute_script("arguments[0].click()", page.find_element(By.CSS_SELECTOR, selector))


def probes(folder: Path, name: str = "aligned") -> list[dict[str, Any]]:
    return read_records(RunFolder(folder / name / "run").held_out)


class TestAlone:
    def test_the_table(self, page: Chrome, folder: Path) -> None:
        rows = {row.get_attribute("data-run"): row for row in page.find_elements(By.CSS_SELECTOR, "#runs tbody tr")}
        assert set(rows) == {"aligned", HOSTILE}
        assert HOSTILE in rows[HOSTILE].text
        heads = [head.text for head in page.find_elements(By.CSS_SELECTOR, "#runs th.setting")]
        assert heads == ["steps", "align share"]
        cells = {
            name: [cell.text for cell in row.find_elements(By.CSS_SELECTOR, ".setting")] for name, row in rows.items()
        }
        assert cells == {"aligned": ["6", "0.5"], HOSTILE: ["8", "0"]}
        highlighted = [row.find_elements(By.CSS_SELECTOR, ".other") for row in rows.values()]
        assert sorted(map(len, highlighted)) == [0, 2]
        assert f"{probes(folder)[-1]['domains']['stories']['kl']:.2f}"[:4] in rows["aligned"].text
        assert "finished" in rows["aligned"].text
        assert re.search(r"(running|stopped), 62 %", rows[HOSTILE].text)
        click(page, "#same summary")
        assert "mixer lr\n0.002" in page.find_element(By.ID, "same").text

    def test_held_out_curves(self, page: Chrome, folder: Path) -> None:
        click(page, "#log")
        for name in ("aligned", HOSTILE):
            records = probes(folder, name)
            for domain in ("stories", "letters"):
                kls = [record["domains"][domain]["kl"] for record in records]
                assert_drawn(curve(page, domain, name), [record["tokens"] for record in records], kls)
        assert "kept out" in card(page, "letters").text
        assert "kept out" not in card(page, "stories").text
        assert card(page, "stories").find_elements(By.CLASS_NAME, "teacher") == []
        assert "distil" in card(page, "stories").text

    def test_the_teacher_is_a_line(self, page: Chrome, folder: Path) -> None:
        click(page, "input[value=loss]")
        records = probes(folder)
        (line,) = card(page, "stories").find_elements(By.CLASS_NAME, "teacher")
        assert line.value_of_css_property("stroke-dasharray") == "5px, 4px"
        heights = {y for _, y in curve(page, "stories", "teacher")}
        assert len(heights) == 1
        losses = [record["domains"]["stories"]["loss"] for record in records]
        assert min(losses) > records[0]["domains"]["stories"]["teacher_loss"]
        assert max(y for _, y in curve(page, "stories", "aligned")) < heights.pop()  # pixels count downwards

    def test_hours_and_dollars(self, page: Chrome, folder: Path) -> None:
        records = probes(folder)
        assert page.find_element(By.ID, "hours-name").text == "CPU-hours"
        dollars = page.find_element(By.CSS_SELECTOR, "input[value=dollars]")
        assert not dollars.is_enabled()
        page.find_element(By.ID, "price").send_keys("1000")
        assert dollars.is_enabled()
        for choice in ("hours", "dollars"):
            click(page, f"input[value={choice}]")
            click(page, "input[value=agreement]")
            shares = [record["domains"]["stories"]["agreement"] for record in records]
            assert_drawn(curve(page, "stories", "aligned"), [record["device_seconds"] for record in records], shares)
        cost = records[-1]["device_seconds"] / 3600 * 1000
        row = page.find_element(By.CSS_SELECTOR, "tr[data-run=aligned]").text
        assert f"${cost:.3f}" in row or f"${cost:.2f}" in row
        assert "price=1000" in page.current_url
        page.find_element(By.ID, "price").send_keys(Keys.BACKSPACE * 4)
        assert not dollars.is_enabled()

    def test_a_run_can_be_left_out(self, page: Chrome) -> None:
        click(page, "tr[data-run=aligned] input")
        assert curve(page, "stories", "aligned") == []
        assert curve(page, "stories", HOSTILE)
        page.refresh()
        assert curve(page, "stories", "aligned") == []
        click(page, "tr[data-run=aligned] input")
        assert curve(page, "stories", "aligned")

    def test_numbers_under_the_pointer(self, page: Chrome, folder: Path) -> None:
        chart = card(page, "stories").find_element(By.TAG_NAME, "svg")
        page.execute_script("arguments[0].scrollIntoView({block: 'center'})", chart)
        ActionChains(page).move_to_element_with_offset(chart, chart.size["width"] // 2 - 10, 0).perform()
        tip = page.find_element(By.ID, "tip")
        assert tip.text.splitlines()[0] == "768 tokens"
        assert f"aligned {probes(folder)[-1]['domains']['stories']['kl']:.3f}"[:12] in tip.text

    def test_one_moment(self, page: Chrome, folder: Path) -> None:
        records = probes(folder)
        click(page, f"tr[data-run='{HOSTILE}'] input")
        for moment, record in ((1, records[-1]), (0, records[0])):
            page.execute_script(
                "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))",
                page.find_element(By.ID, "probe"),
                moment,
            )
            assert page.find_element(By.ID, "probe-name").text == f"after {record['tokens']} tokens"
            places = record["domains"]["stories"]["by_position"]["loss"]
            assert_drawn(curve(page, "stories by position", "aligned"), list(range(len(places))), places)
            layers = record["layers"]
            assert len(card(page, "aligned half-lives").find_elements(By.TAG_NAME, "line")) == len(layers)
            cells = sum(count > 0 for layer in layers for count in layer["octaves"])
            assert len(card(page, "aligned half-lives").find_elements(By.TAG_NAME, "rect")) == cells

    def test_benchmarks(self, page: Chrome, folder: Path) -> None:
        report = json.loads((folder / "aligned" / "evaluation" / "evaluation.json").read_text())["tasks"]["cloze"]
        row = page.find_element(By.CSS_SELECTOR, "#tasks tr[data-task=cloze]").text
        for estimate in (report["scores"]["teacher"], report["scores"]["student"], report["recovered"]["student"]):
            assert f"{100 * estimate['value']:.1f} ± {100 * estimate['error']:.1f}" in row
        assert "by likelihood, 0-shot, 200 documents" in row
        heads = [head.text for head in page.find_elements(By.CSS_SELECTOR, "#tasks th")]
        assert heads == ["benchmark", "chance", "teacher", "aligned"]

    def test_training_curves(self, page: Chrome, folder: Path) -> None:
        metrics = read_records(RunFolder(folder / "aligned" / "run").metrics)
        wanted = [line["next_token_loss"] for line in metrics if "next_token_loss" in line]
        click(page, f"tr[data-run='{HOSTILE}'] input")
        got = curve(page, "training: Next-token loss", "aligned")
        assert_drawn(got, [line["tokens"] for line in metrics[3:]], wanted)


def test_a_page_without_runs(chrome: Chrome, tmp_path: Path) -> None:
    (tmp_path / "runs.html").write_text(render_page(read_runs([tmp_path])), encoding="utf-8")
    chrome.get((tmp_path / "runs.html").as_uri())
    assert chrome.find_element(By.TAG_NAME, "main").text.startswith("No runs here yet: power-retention retrain")
    assert chrome.get_log("browser") == []


def test_what_cannot_be_read_is_named(chrome: Chrome, tmp_path: Path) -> None:
    (tmp_path / "broken" / "run").mkdir(parents=True)
    (tmp_path / "broken" / "run" / "run.json").write_text('{"recipe": ')
    (tmp_path / "runs.html").write_text(render_page(read_runs([tmp_path])), encoding="utf-8")
    chrome.get((tmp_path / "runs.html").as_uri())
    assert str(tmp_path / "broken" / "run") in chrome.find_element(By.ID, "unreadable").text
    assert chrome.get_log("browser") == []


@contextmanager
def served(folder: Path) -> Iterator[str]:
    with RunsServer(lambda: read_runs([folder])) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.url
        finally:
            server.shutdown()
            thread.join()


def test_it_follows_a_run(chrome: Chrome, folder: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(folder, tmp_path / "experiments"))
    run = RunFolder(own / HOSTILE / "run")
    whole = run.held_out.read_text()
    run.held_out.write_text("".join(whole.splitlines(keepends=True)[:1]))
    wait = WebDriverWait(chrome, 20, poll_frequency=0.1)
    with served(own) as url:
        chrome.get(url)
        chrome.execute_script("window.same = true")
        sign = chrome.find_element(By.ID, "live")
        wait.until(lambda _: sign.text in ("live", "up to date"))
        assert len(curve(chrome, "stories", HOSTILE)) == 1
        run.held_out.write_text(whole)
        wait.until(lambda page: len(curve(page, "stories", HOSTILE)) == len(probes(own, HOSTILE)))
        shutil.copytree(own / "aligned", own / "new")
        wait.until(lambda page: page.find_elements(By.CSS_SELECTOR, "tr[data-run=new]"))
        assert chrome.execute_script("return window.same"), "loaded again"
        assert chrome.get_log("browser") == []
    wait.until(lambda _: sign.text == "not connected")
    assert len(curve(chrome, "stories", "new")) == len(probes(own))
    chrome.get("about:blank")
    chrome.get_log("browser")  # says that nobody answered
