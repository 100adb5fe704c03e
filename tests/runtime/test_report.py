"""The report's page in a real browser."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import cv2
import numpy as np
import pytest
from browser import needs_browser, opened
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from vmad_edge.runtime.bundle import Thresholds
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.inspection import Inspection, NearestNormal, Region, Verdict
from vmad_edge.runtime.names import PICTURE
from vmad_edge.runtime.report import Report

THRESHOLDS = Thresholds(good_below=0.3, defect_above=0.6)
ABOUT = {"object": "part <1>", "thresholds": "GOOD below 0.300"}
ODD = "<i>#1 100%</i> 'ä' \"ж\" 部品&amp;{{rows}}.png"


def inspections() -> list[Inspection]:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (48, 64, 3), np.uint8)
    heat_map = rng.random((48, 64), np.float32)
    heat_map[:, :9] = np.nan
    jpeg = cv2.imencode(".jpg", pixels[:32, :32])[1].tobytes()
    nearest = NearestNormal("reference.png", (0, 0, 8, 8), 0.9, jpeg, (0, 0), 4, (32, 32, 40, 40))
    made = [
        Inspection(
            Frame(pixels, name, name),
            "part",
            verdict,
            score=score,
            map=heat_map,
            mask=heat_map > 0.95 if verdict is Verdict.DEFECT else None,
            regions=(Region((10, 10, 20, 30), 99, 0.97, (15.0, 20.0)),),
            nearest_normal=nearest,
            p_yes=0.75,
            explanation="Yes. <b>There is a pit</b> & a scratch.",
            timings_ms={"clip_encoder": 10.0, "similarity": 5.0, "screen": 15.0 + score},
        )
        for name, verdict, score in [
            ("b.png", Verdict.GOOD, 0.25),
            (ODD, Verdict.DEFECT, 0.9),
            ("c.png", Verdict.UNCERTAIN, 0.5),
            ("d.png", Verdict.GOOD, 0.125),
        ]
    ]
    nothing = Frame(np.zeros((0, 0, 3), np.uint8), "e.png", "e.png")
    return [*made, Inspection(nothing, "part", Verdict.NOT_INSPECTED, reason="e.png: not a readable image")]


def written(folder: Path, thresholds: Thresholds | None, found: list[Inspection]) -> Path:
    report = Report(folder, thresholds, [inspection.frame.id for inspection in found])
    for inspection in found:
        report.add(inspection)
    return report.write(ABOUT)


def many(folder: Path, count: int) -> Path:
    """A page of `count` frames, taken over from an earlier one: the worst frame is the last but one."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    heat_map = np.full((16, 16), 0.5, np.float32)
    good, bad = (
        Inspection(Frame(pixels, name, name), "part", verdict, score=score, map=heat_map, regions=regions)
        for name, verdict, score, regions in (
            ("lot/0.png", Verdict.GOOD, 0.1, ()),
            (f"lot/{count - 2}.png", Verdict.DEFECT, 0.9, (Region((2, 3, 6, 9), 24, 0.5, (4.0, 6.0)),)),
        )
    )
    page = written(folder, THRESHOLDS, [good, bad])
    first, worst = (line for line in page.read_text("utf-8").splitlines() if line.startswith("<article"))
    rows = {count - 2: worst}
    for number in {*range(count)} - {*rows}:
        rows[number] = first.replace("0.png", f"{number}.png").replace('="0.1"', f'="{0.1 + number / 1e4}"')
        for kind in ("thumbnails", "pictures") if number else ():
            (folder / kind / f"lot_{number}.png{PICTURE}").hardlink_to(folder / kind / f"lot_0.png{PICTURE}")
    page.write_text("\n".join(rows[number] for number in range(count)), "utf-8")
    report = Report(folder, THRESHOLDS)
    assert report.take_over(f"lot/{number}.png" for number in range(count)) == count
    return report.write(ABOUT)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with opened(written(tmp_path_factory.mktemp("repört #1"), THRESHOLDS, inspections())) as driver:
        yield driver


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with opened(many(tmp_path_factory.mktemp("long"), 2000)) as driver:
        driver.set_window_size(1200, 900)
        yield driver


@pytest.fixture
def anew(long: Chrome) -> Chrome:
    long.refresh()
    return long


def visible(browser: Chrome, column: str = "name") -> list[str]:
    return [str(row.get_attribute(f"data-{column}")) for row in browser.find_elements(By.TAG_NAME, "article")]


def put(browser: Chrome, place: str, value: str, event: str) -> None:
    browser.execute_script(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1]; e['on' + arguments[2]]()",
        *(place, value, event),
    )


def loaded(browser: Chrome) -> list[int]:
    """Widths of the pictures in sight, once they are there; those that nobody saw yet have none."""
    WebDriverWait(browser, 20).until(lambda b: b.execute_script("return document.images[0].naturalWidth > 0"))
    return list(browser.execute_script("return [...document.querySelectorAll('main img')].map(i => i.naturalWidth)"))


@needs_browser
def test_page_shows_everything(browser: Chrome) -> None:
    text = browser.find_element(By.TAG_NAME, "body").text
    for words in ("part <1>", "GOOD below 0.300", "Yes. <b>There is a pit</b> & a scratch.", ODD, "5 frames"):
        assert words in text
    assert "e.png: not a readable image" in text and "P(yes) 0.75" in text and "10 × 20 px at 10, 10" in text
    browser.execute_script("for (const image of document.images) image.loading = 'eager'")
    WebDriverWait(browser, 20).until(
        lambda b: b.execute_script("return [...document.querySelectorAll('main img')].every(i => i.complete)")
    )
    widths = loaded(browser)
    assert len(widths) == 4 * 2 and min(widths) > 0  # a frame under its map, its worst place
    assert browser.get_log("browser") == []


@needs_browser
@pytest.mark.parametrize("verdict,count", [("GOOD", 2), ("DEFECT", 1), ("NOT_INSPECTED", 1), ("UNCERTAIN", 1), ("", 5)])
def test_filter(browser: Chrome, verdict: str, count: int) -> None:
    browser.find_element(By.CSS_SELECTOR, f'[data-show="{verdict}"]').click()
    shown = visible(browser, "verdict")
    assert len(shown) == count and (not verdict or set(shown) == {verdict})
    assert browser.find_element(By.ID, "count").text == f"{count} frames"


@needs_browser
@pytest.mark.parametrize(
    "order,names",
    [
        ("best", ["d.png", "b.png", "c.png", "e.png", ODD]),
        ("name", [ODD, "b.png", "c.png", "d.png", "e.png"]),
        ("slowest", [ODD, "c.png", "b.png", "d.png", "e.png"]),
        ("worst", [ODD, "e.png", "c.png", "b.png", "d.png"]),
    ],
)
def test_order(browser: Chrome, order: str, names: list[str]) -> None:
    put(browser, "order", order, "change")
    assert visible(browser) == names


@needs_browser
@pytest.mark.parametrize("width", [500, 768, 1024])
def test_fits_small_windows(browser: Chrome, width: int) -> None:
    browser.set_window_size(width, 1000)
    assert browser.execute_script("return [window.innerWidth, document.documentElement.scrollWidth <= innerWidth]") == [
        width,
        True,
    ]


@needs_browser
def test_paper(browser: Chrome) -> None:
    """An A4 page's width holds the rows; buttons stay on the screen."""
    browser.set_window_size(794, 1123)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    shown, fits = browser.execute_script(
        "return [document.getElementById('bar').offsetHeight, document.body.scrollWidth <= window.innerWidth]"
    )
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert shown == 0 and fits
    assert len(visible(browser)) == 5


@needs_browser
def test_dark(browser: Chrome) -> None:
    def colours() -> list[str]:
        script = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
        return list(browser.execute_script(script))

    light = colours()
    feature = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
    dark = colours()
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert light == ["rgb(255, 255, 255)", "rgb(26, 26, 26)"] and dark == ["rgb(22, 22, 22)", "rgb(232, 232, 232)"]


@needs_browser
def test_of_many_frames_the_worst_comes_first_and_few_pictures_are_loaded(anew: Chrome) -> None:
    assert visible(anew)[:3] == ["lot/1998.png", "lot/1999.png", "lot/1997.png"] and len(visible(anew)) == 50
    assert anew.find_element(By.ID, "count").text == "1–50 of 2000 frames"
    widths = loaded(anew)
    assert len(widths) == 50 and 0 < sum(width > 0 for width in widths) < 40
    assert len(anew.execute_script("return performance.getEntriesByType('resource')")) < 40  # nothing else either


@needs_browser
def test_pages_and_search(anew: Chrome) -> None:
    turns = anew.find_elements(By.CSS_SELECTOR, "[data-turn]")
    assert [turn.is_enabled() for turn in turns] == [False, True] * 2
    turns[1].click()
    assert visible(anew)[0] == "lot/1949.png" and all(turn.is_enabled() for turn in turns)
    put(anew, "search", "LOT/12", "input")
    assert anew.find_element(By.ID, "count").text == "1–50 of 111 frames"  # 12, 120 to 129, 1200 to 1299
    put(anew, "each", "Infinity", "change")
    assert len(visible(anew)) == 111


@needs_browser
def test_the_large_picture_opens_with_its_regions_and_steps_through(anew: Chrome) -> None:
    loaded(anew)
    anew.find_element(By.CSS_SELECTOR, "article img").click()
    dialog = anew.find_element(By.TAG_NAME, "dialog")
    large = dialog.find_element(By.TAG_NAME, "img")
    WebDriverWait(anew, 20).until(lambda _: large.get_property("naturalWidth"))
    assert int(str(large.get_property("naturalWidth"))) > 1500  # the frame beside its map
    assert "lot/1998.png" in dialog.text and "4 × 6 px at 2, 3" in dialog.text
    anew.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert "lot/1999.png" in dialog.text and "2 of 2000" in dialog.text and "px at" not in dialog.text
    anew.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not dialog.is_displayed()


@needs_browser
def test_without_thresholds_rows_have_ranks_and_no_verdict_colour(tmp_path: Path) -> None:
    found = [replace(inspection, verdict=Verdict.UNCERTAIN) for inspection in inspections()[:4]]
    with opened(written(tmp_path, None, [*found, inspections()[4]])) as browser:
        assert visible(browser) == [ODD, "c.png", "b.png", "d.png", "e.png"]
        ranks = [rank.text for rank in browser.find_elements(By.CLASS_NAME, "rank")]
        assert ranks == [f"rank {place} of 5" for place in range(1, 6)]
        verdicts = browser.find_elements(By.CSS_SELECTOR, "article .verdict")
        assert {verdict.value_of_css_property("color") for verdict in verdicts} == {"rgba(85, 85, 85, 1)"}


def test_rows_are_taken_over_with_their_pictures(tmp_path: Path) -> None:
    found = inspections()
    written(tmp_path, THRESHOLDS, found[:3])
    report = Report(tmp_path, THRESHOLDS, [inspection.frame.id for inspection in found])
    assert report.take_over([inspection.frame.id for inspection in found[1:]]) == 2
    for inspection in found[3:]:
        report.add(inspection)
    page = report.write(ABOUT).read_text("utf-8")
    assert page.count("<article data-name=") == 4 and 'data-name="b.png"' not in page
    assert page.count("{{") == page.count("{{rows}}.png") == page.count(html.escape(ODD))


def test_each_picture_of_the_page_is_there_and_nothing_else(tmp_path: Path) -> None:
    page = written(tmp_path, THRESHOLDS, inspections()).read_text("utf-8")
    named = {unquote(html.unescape(link)) for link in re.findall('(?:src|href)="([^"]+)"', page)}
    there = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert there == {"index.html", *named} and len(named) == 3 * 4
    assert all(name.endswith(PICTURE) for name in named)
    assert "http:" not in page and "https:" not in page
