"""The report's page in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from browser import needs_browser, opened
from PIL import Image
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.inspection import Inspection, NearestNormal, Region, Verdict
from vmad_edge.runtime.report import Report, heat, write_map


def inspections() -> list[Inspection]:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (48, 64, 3), np.uint8)
    heat_map = rng.random((48, 64), np.float32)
    heat_map[:, :9] = np.nan
    jpeg = cv2.imencode(".jpg", pixels[:32, :32])[1].tobytes()
    nearest = NearestNormal("reference.png", (0, 0, 8, 8), 0.9, jpeg, (0, 0), 4)
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
            ("<i>a</i>.png", Verdict.DEFECT, 0.9),
            ("c.png", Verdict.UNCERTAIN, 0.5),
            ("d.png", Verdict.GOOD, 0.125),
        ]
    ]
    nothing = Frame(np.zeros((0, 0, 3), np.uint8), "e.png", "e.png")
    return [*made, Inspection(nothing, "part", Verdict.NOT_INSPECTED, reason="e.png: not a readable image")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    report = Report(tmp_path_factory.mktemp("report"), heat_top=1.0)
    for inspection in inspections():
        report.add(inspection)
    page = report.write(["Five frames."])
    with opened(page) as driver:
        yield driver


def visible(browser: Chrome, column: str = "name") -> list[str]:
    rows = browser.find_elements(By.CSS_SELECTOR, "tbody tr")
    return [str(row.get_attribute(f"data-{column}")) for row in rows if row.is_displayed()]


@needs_browser
def test_page_shows_everything(browser: Chrome) -> None:
    text = browser.find_element(By.TAG_NAME, "body").text
    for words in ("Five frames.", "Yes. <b>There is a pit</b> & a scratch.", "<i>a</i>.png", "5 of 5 frames"):
        assert words in text
    assert "e.png: not a readable image" in text and "P(yes) 0.75" in text and "[10, 10, 20, 30]" in text
    widths = browser.execute_script("return [...document.images].map(image => image.naturalWidth)")
    assert len(widths) == 1 + 4 * 3 and min(widths) > 0  # the colour scale; a frame, its heat, its nearest normal place
    assert len(browser.find_elements(By.CSS_SELECTOR, ".time > i")) == 4 * 2  # two stages each
    assert browser.get_log("browser") == []


@needs_browser
@pytest.mark.parametrize("verdict,count", [("GOOD", 2), ("DEFECT", 1), ("NOT_INSPECTED", 1), ("UNCERTAIN", 1), ("", 5)])
def test_filter(browser: Chrome, verdict: str, count: int) -> None:
    browser.find_element(By.CSS_SELECTOR, f'[data-show="{verdict}"]').click()
    shown = visible(browser, "verdict")
    assert len(shown) == count and (not verdict or set(shown) == {verdict})
    assert browser.find_element(By.ID, "count").text == f"{count} of 5 frames"


@needs_browser
def test_sort(browser: Chrome) -> None:
    by_score = ["e.png", "d.png", "b.png", "c.png", "<i>a</i>.png"]
    head = browser.find_element(By.CSS_SELECTOR, '[data-sort="score"]')
    head.click()
    assert visible(browser) == by_score
    head.click()
    assert visible(browser) == by_score[::-1]


@needs_browser
@pytest.mark.parametrize("width", [768, 1024])
def test_fits_a_tablet(browser: Chrome, width: int) -> None:
    browser.set_window_size(width, 1000)
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


@needs_browser
def test_paper(browser: Chrome) -> None:
    """An A4 page's width holds the table; buttons stay on the screen."""
    browser.find_element(By.CSS_SELECTOR, '[data-show=""]').click()
    browser.set_window_size(794, 1123)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    shown, fits = browser.execute_script(
        "return [document.getElementById('bar').offsetHeight, document.body.scrollWidth <= window.innerWidth]"
    )
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert shown == 0 and fits
    assert len(visible(browser)) == 5


def test_heat_is_hot_where_the_map_is() -> None:
    pixels = np.full((4, 4, 3), 128, np.uint8)
    values = np.zeros((4, 4), np.float32)
    values[0, 0], values[3, 3] = 1.0, 7.0
    shown = heat(Inspection(Frame(pixels, "x"), "part", Verdict.GOOD, map=values), top=1.0).astype(int)
    assert shown[0, 0, 0] > shown[0, 0, 2] + 40  # red
    np.testing.assert_array_equal(shown[3, 3], shown[0, 0])  # clipped
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) == 2


def test_a_map_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(37, 53)).astype(np.float32)
    values[0, :4] = np.nan, np.inf, -0.0, 1e-42
    write_map(tmp_path / "map.tiff", values)
    with Image.open(tmp_path / "map.tiff") as read:
        assert read.mode == "F" and read.tag_v2[259] == 1  # not compressed: readers differ in what they unpack
        assert np.asarray(read).tobytes() == values.tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["map.tiff"]
