from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from browser import needs_browser, opened
from plain_parts import plain_part
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from sklearn.metrics import average_precision_score, roc_auc_score

from vmad_edge.runtime.bundle import Bundle, Thresholds
from vmad_edge.runtime.cli import main
from vmad_edge.runtime.dataset import LabelledFrame
from vmad_edge.runtime.errors import VmadError
from vmad_edge.runtime.evaluate import Evaluation, compare, evaluate, read_evaluation
from vmad_edge.runtime.evaluate_page import PUBLISHED, write_page
from vmad_edge.runtime.inspection import Verdict, verdict_of
from vmad_edge.runtime.inspector import Inspector


def write(path: Path, image: np.ndarray[Any, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


def draw(folder: Path, seed: int) -> None:
    """One category in MVTec AD's layout: four frames to enroll, three good and three defective ones to test."""
    rng = np.random.default_rng(seed)
    for name in ("train/good/0", "train/good/1", "train/good/2", "train/good/3", "test/good/0", "test/good/1"):
        write(folder / f"{name}.png", plain_part(rng, 6, 64, 48).clip(0, 255).astype(np.uint8))
    for number, ending in enumerate(("_mask", "", "_mask")):
        part, mask = plain_part(rng, 6, 64, 48), np.zeros((64, 48), np.uint8)
        mask[20 : 40 + number, 10:30] = mask[5:9, 40:44] = 255
        part[mask > 0] = rng.integers(0, 256, (int((mask > 0).sum()), 3))
        write(folder / f"test/scratch/{number}.png", part.clip(0, 255).astype(np.uint8))
        write(folder / f"ground_truth/scratch/{number}{ending}.png", mask)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    draw(folder / "nut", 0)
    draw(folder / "bolt_m3", 1)
    return folder


@pytest.fixture(scope="module")
def evaluated(bundle: Bundle, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluation with two shots."""
    out = tmp_path_factory.mktemp("evaluated") / "out"
    evaluate(bundle, dataset, out, shots=2, seed=1)
    return out


def test_figures_are_those_of_the_inspectors_own_scores_and_maps(
    evaluated: Path, bundle: Bundle, dataset: Path, tmp_path: Path
) -> None:
    found = read_evaluation(evaluated)
    assert [category.name for category in found.categories] == ["bolt_m3", "nut"]
    result = found.categories[1]
    # Which two of the four were enrolled is the seed's affair: exactly one pair gives these scores.
    pairs = [(a, b) for a in range(4) for b in range(a)]
    fitting = []
    with Inspector.open(bundle.path, tmp_path) as inspector:
        for pair in pairs:
            inspector.enroll([dataset / f"nut/train/good/{i}.png" for i in pair], object="nut", keep=False)
            seen = [inspector.inspect(dataset / "nut" / f.name, object="nut", review=False) for f in result.frames]
            if [inspection.score for inspection in seen] == pytest.approx([f.score for f in result.frames], abs=1e-6):
                fitting.append(seen)
    assert len(fitting) == 1 and result.enrolled == 2
    masks = []
    for frame in result.frames:
        marks = list((dataset / "nut/ground_truth/scratch").glob(f"{Path(frame.name).stem}*"))
        masks.append(cv2.imread(str(marks[0]), 0) > 0 if frame.defective else np.zeros((64, 48), bool))
    positive, maps = np.array(masks).ravel(), np.array([inspection.map for inspection in fitting[0]]).ravel()
    labels, scores = [f.defective for f in result.frames], [f.score for f in result.frames]
    assert result.figures.image_auroc == pytest.approx(roc_auc_score(labels, scores), abs=1e-9)
    assert result.figures.image_ap == pytest.approx(average_precision_score(labels, scores), abs=1e-9)
    assert result.figures.pixel_auroc == pytest.approx(roc_auc_score(positive, maps), abs=1e-4)
    assert result.figures.pixel_ap == pytest.approx(average_precision_score(positive, maps), abs=1e-4)
    assert sum(frame.regions for frame in result.frames) == 6
    aurocs = [category.figures.image_auroc for category in found.categories]
    assert found.mean.image_auroc == pytest.approx(np.mean([value for value in aurocs if value is not None]))
    assert found.mean.p_yes_auroc is None


class Interrupted(Exception):
    pass


def test_goes_on_where_it_stopped(bundle: Bundle, dataset: Path, evaluated: Path, tmp_path: Path) -> None:
    done: list[str] = []

    def stop_at(number: int) -> Callable[[Sequence[LabelledFrame], str], Iterable[LabelledFrame]]:
        def progress(frames: Sequence[LabelledFrame], _: str) -> Iterable[LabelledFrame]:
            for frame in frames:
                if len(done) == number:
                    raise Interrupted
                yield frame
                done.append(frame.name)

        return progress

    with pytest.raises(Interrupted):
        evaluate(bundle, dataset, tmp_path, shots=2, seed=1, categories=["nut"], progress=stop_at(3))
    with pytest.raises(VmadError, match=r"no results\.json"):
        read_evaluation(tmp_path)
    kept = {name: (tmp_path / "nut/frames" / name / "result.json").stat().st_mtime_ns for name in done}
    after = evaluate(bundle, dataset, tmp_path, shots=2, seed=1, categories=["nut"])
    assert after.categories[0] == read_evaluation(evaluated).categories[1]
    assert kept == {name: (tmp_path / "nut/frames" / name / "result.json").stat().st_mtime_ns for name in kept}
    assert len(kept) == 3 and not list(tmp_path.rglob("scores.npy"))

    again = evaluate(
        bundle, dataset, tmp_path, shots=2, seed=1, categories=["nut"], progress=stop_at(len(done))
    )  # would be interrupted if there was anything left to inspect
    assert again == after
    with pytest.raises(VmadError, match=r"holds another evaluation: shots 2, now 1; choose another --out"):
        evaluate(bundle, dataset, tmp_path, shots=1, seed=1)


def test_what_cannot_be_inspected_or_measured_is_counted_and_said(
    bundle: Bundle, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(dataset / "nut", tmp_path / "nut")
    (tmp_path / "nut/test/good/broken.png").write_text("no image")
    (tmp_path / "nut/ground_truth/scratch/0_mask.png").unlink()
    write(tmp_path / "nut/ground_truth/scratch/1.png", np.zeros((64, 48), np.uint8))
    status = main(["evaluate", str(bundle.path), str(tmp_path / "nut"), "--out", str(tmp_path / "out"), "--json"])
    printed = capsys.readouterr()
    facts = json.loads(printed.out)
    assert status == 3
    nut = facts["categories"]["nut"]
    assert (nut["frames"], nut["not_inspected"], nut["without_mask"], nut["enrolled"]) == (6, 1, 2, 0)
    names = {"image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro"}
    assert all(0 <= nut[name] <= 1 for name in names) and names <= facts["mean"].keys()
    said = " ".join(printed.err.split())
    assert "1 frames were not inspected" in said and "not a readable image" in said
    assert "2 defective frames have no mask" in said
    frames = {frame.name: frame for frame in read_evaluation(tmp_path / "out").categories[0].frames}
    assert frames["test/good/broken.png"].verdict is Verdict.NOT_INSPECTED
    assert frames["test/scratch/0.png"].pixels == (0, 0)  # in the image figures alone
    assert sum(sum(frame.pixels) for frame in frames.values()) == 3 * 64 * 48


def test_page(evaluated: Path) -> None:
    found = read_evaluation(evaluated)
    page = write_page(found, evaluated).read_text("utf-8")
    assert page.count("<polyline") == 6  # three curves of two categories
    assert page.count("<figure>") == 10  # of three defects two worst and one best, of two good parts two worst
    assert "://" not in page and "{{" not in page
    assert f"{100 * (found.mean.image_auroc or 0):.1f}" in page and "paper" not in page.split("</style>")[1]


def test_the_thresholds_are_kept_that_the_verdicts_are_of(bundle: Bundle, dataset: Path, tmp_path: Path) -> None:
    (category,) = evaluate(bundle, dataset, tmp_path, shots="all", categories=["nut"]).categories
    assert category.thresholds is not None
    for frame in category.frames:
        if frame.score is not None and frame.reason_code is None:
            assert verdict_of(frame.score, category.thresholds) is frame.verdict
    assert evaluate(bundle, dataset, tmp_path, shots="all", categories=["nut"]).categories == (category,)


def test_page_has_the_scores_and_where_the_thresholds_lie(evaluated: Path) -> None:
    found = read_evaluation(evaluated)
    category = found.categories[1]
    scores = {
        side: [frame.score or 0 for frame in category.frames if frame.defective is side] for side in (False, True)
    }
    marks = min(scores[True]), max(scores[True]) + 0.1
    category = category.model_copy(
        update={"thresholds": Thresholds(good_below=marks[0], defect_above=marks[1]), "name": "<b>"}
    )
    page = write_page(found.model_copy(update={"categories": (category,)}), evaluated).read_text("utf-8")
    assert f"UNCERTAIN {marks[0]:.3f}" in page and f"DEFECT {marks[1]:.3f}" in page and "<h2>&lt;b&gt;" in page
    reach = min(*scores[False], *scores[True]), marks[1]
    tallest = max(np.histogram(some, 30, reach)[0].max() for some in scores.values())
    for kind, defective in (("good", False), ("bad", True)):
        heights = re.findall(f'<rect class="{kind}"[^>]* height="([0-9.]+)"', page)
        assert max(map(float, heights)) <= 110
        assert sum(map(float, heights)) * tallest / 96 == pytest.approx(len(scores[defective]), abs=0.05)
    good = float(np.mean(np.array(scores[False]) >= marks[0]))
    rings = [tuple(map(float, ring)) for ring in re.findall('<circle cx="([0-9.]+)" cy="([0-9.]+)"', page)]
    assert rings == [(pytest.approx(30 + 220 * good, abs=0.1), 20.0), (30.0, 240.0)]


@needs_browser
def test_page_in_a_browser(evaluated: Path) -> None:
    found = read_evaluation(evaluated)
    with opened(write_page(found, evaluated)) as browser:
        assert not browser.get_log("browser")
        rows = browser.find_elements(By.CSS_SELECTOR, "tbody tr")
        cells = [[cell.text for cell in row.find_elements(By.TAG_NAME, "td")] for row in rows]
        assert [row[0] for row in cells] == ["bolt_m3", "nut", "mean"] and cells[1][1:5] == [
            "2",
            "5",
            "0",
            "0 good, 0 defective",
        ]
        assert cells[1][5] == f"{100 * (found.categories[1].figures.image_auroc or 0):.1f}"
        for curve in browser.find_elements(By.CSS_SELECTOR, "svg:has(polyline)"):
            frame, line = (curve.find_element(By.TAG_NAME, name).rect for name in ("rect", "polyline"))
            # from corner to corner (PRO may end below the top), and nowhere beyond but for the line's own width
            assert line["x"] == pytest.approx(frame["x"], abs=3) and line["width"] == pytest.approx(
                frame["width"], abs=3
            )
            assert line["y"] + line["height"] == pytest.approx(frame["y"] + frame["height"], abs=3)
            assert line["y"] >= frame["y"] - 3
        browser.execute_script("for (const image of document.images) image.loading = 'eager'")
        for picture in browser.find_elements(By.TAG_NAME, "img"):
            WebDriverWait(browser, 20).until(lambda _, picture=picture: picture.get_property("complete"))
            assert browser.execute_script("return arguments[0].naturalWidth", picture) > 90
        width = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert width[0] <= width[1]


def test_page_shows_what_was_published_for_the_same_data_set_alone(evaluated: Path) -> None:
    found = read_evaluation(evaluated)
    names = PUBLISHED[0].categories.split()
    alike = [found.categories[0].model_copy(update={"name": name, "frames": ()}) for name in names]
    page = write_page(found.model_copy(update={"categories": tuple(alike)}), evaluated.parent).read_text("utf-8")
    row = page[page.index('<tr class="paper">') :].split("</tr>")[0]
    assert [row.count(f"<td>{value}</td>") for value in (95.8, 96.1, 91.2)] == [1, 1, 1]
    few = found.model_copy(update={"categories": tuple(alike[1:])})
    assert '<tr class="paper">' not in write_page(few, evaluated.parent).read_text("utf-8")


def test_compare(evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = read_evaluation(evaluated)
    category = first.categories[1]
    changed = category.frames[0].model_copy(update={"verdict": Verdict.NOT_INSPECTED})
    better = category.figures.model_copy(
        update={"image_auroc": (category.figures.image_auroc or 0) + 0.25, "aupro": None}
    )
    second = Evaluation(
        settings=first.settings,
        categories=(category.model_copy(update={"frames": (changed, *category.frames[1:]), "figures": better}),),
    )
    (compared,) = compare(first, second)
    assert compared.difference["image_auroc"] == pytest.approx(0.25)
    assert compared.difference["image_ap"] == 0 and compared.difference["aupro"] is None
    assert [(f.frame, f.before, f.after) for f in compared.flipped] == [
        (changed.name, category.frames[0].verdict, Verdict.NOT_INSPECTED)
    ]
    (tmp_path / "results.json").write_text(second.model_dump_json())
    assert main(["evaluate", "--compare", str(evaluated), str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["categories"]["nut"]["frames"] == 5
    assert main(["evaluate", "--compare", str(evaluated), str(tmp_path)]) == 0
    assert f"nut: {changed.name}" in capsys.readouterr().out

    other = changed.model_copy(update={"made_of": ("another frame", "", "")})
    strange = category.model_copy(update={"frames": (other, *category.frames[1:])})
    with pytest.raises(VmadError, match="saw different frames"):
        compare(first, second.model_copy(update={"categories": (strange,)}))
    with pytest.raises(VmadError, match="a category in common"):
        compare(first, second.model_copy(update={"categories": ()}))


@pytest.mark.parametrize(
    "args,says",
    [
        (["{data}/nut/train"], "expected MVTec AD's layout"),
        (["{data}", "--categories", "screw"], "has no category screw; it has bolt_m3, nut"),
        (["{data}", "--shots", "5"], "bolt_m3 has 4 normal frames to enroll; --shots 5 asks for more"),
        (["{data}", "--shots", "some"], "expected a number or all"),
        (["{data}", "--out", "{data}/nut"], "is not empty and holds no evaluation"),
        ([], "expected BUNDLE and DATASET"),
    ],
)
def test_usage_errors(
    args: list[str], says: str, bundle: Bundle, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", str(bundle.path), *(arg.format(data=dataset) for arg in args), "--station", str(tmp_path)]
    try:
        status = main(command)
    except SystemExit as left:  # argparse's way
        status = int(str(left.code))
    assert status == 2 and says in capsys.readouterr().err


def evaluated_as_json(
    bundle: Bundle, folder: Path, out: Path, capsys: pytest.CaptureFixture[str], status: int = 0
) -> tuple[dict[str, Any], str]:
    """What `vmad evaluate --json` printed, and the page; every warning stands in both and on standard error."""
    assert main(["evaluate", str(bundle.path), str(folder), "--out", str(out), "--json"]) == status
    printed = capsys.readouterr()
    facts = json.loads(printed.out)
    page = (out / "index.html").read_text("utf-8")
    for warning in facts["warnings"]:
        assert "".join(warning.split()) in "".join(printed.err.split())
        assert html.escape(warning) in page
    return facts, page


@pytest.mark.parametrize(
    "gone,says,left",
    [
        ("test/scratch", "no inspected frame is defective", 2),
        ("test/good", "no inspected frame is normal (in a folder called good, ok or normal)", 3),
    ],
)
def test_a_set_of_one_side_says_that_there_is_nothing_to_tell_apart(
    gone: str, says: str, left: int, bundle: Bundle, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(dataset / "nut", tmp_path / "nut")
    shutil.rmtree(tmp_path / "nut" / gone)
    facts, _ = evaluated_as_json(bundle, tmp_path / "nut", tmp_path / "out", capsys)
    assert facts["warnings"] == [f"nut: nothing to tell apart, so no figures: {says}"]
    assert facts["categories"]["nut"]["image_auroc"] is None and facts["categories"]["nut"]["frames"] == left


def test_what_was_left_out_is_said_each_time(
    bundle: Bundle, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "nut"
    shutil.copytree(dataset / "nut", folder)
    before, _ = evaluated_as_json(bundle, folder, tmp_path / "before", capsys)
    assert before["warnings"] == []
    shutil.copy(folder / "test/good/0.png", folder / "test/overview<1>.png")
    (folder / "test/.ipynb_checkpoints").mkdir()
    shutil.copy(folder / "test/good/0.png", folder / "test/.ipynb_checkpoints/0-checkpoint.png")
    for _ in range(2):  # the second time nothing is left to inspect
        after, _ = evaluated_as_json(bundle, folder, tmp_path / "after", capsys)
        assert after["categories"] == before["categories"]
        (warning,) = after["warnings"]
        assert "overview<1>.png" in warning and ".ipynb_checkpoints" in warning


def test_figures_do_not_hang_on_how_masks_are_saved(
    bundle: Bundle, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(dataset / "nut", tmp_path / "grey/nut")
    shutil.copytree(dataset / "nut", tmp_path / "other/nut")
    for number, name in enumerate(("0_mask", "1", "2_mask")):
        path = tmp_path / f"other/nut/ground_truth/scratch/{name}.png"
        mask = cv2.imread(str(path), 0)
        path.unlink()
        if number == 0:  # alpha
            write(path, np.dstack([mask, mask, mask, np.full_like(mask, 255)]))
        elif number == 1:  # one file a region, in a folder
            for region in range(2):
                write(path.with_suffix("") / f"{region:03}.png", (cv2.connectedComponents(mask)[1] == region + 1) * 254)
        else:
            write(path.with_suffix(".BMP"), mask)
    grey, other = (
        evaluated_as_json(bundle, tmp_path / name, tmp_path / f"out_{name}", capsys)[0] for name in ("grey", "other")
    )
    assert other["categories"] == grey["categories"] and not other["warnings"]


def test_a_mask_in_doubt_and_one_of_the_whole_frame_are_said(
    bundle: Bundle, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "nut"
    shutil.copytree(dataset / "nut", folder)
    write(folder / "ground_truth/scratch/0_mask.png", np.full((64, 48), 255, np.uint8))
    numbers = cv2.imread(str(folder / "ground_truth/scratch/1.png"), 0) // 255
    numbers[:10] *= 3
    write(folder / "ground_truth/scratch/1.png", numbers)
    facts, _ = evaluated_as_json(bundle, folder, tmp_path / "out", capsys)
    (warning,) = facts["warnings"]
    assert warning.startswith("nut: 2 masks may mean something else than they are taken for")
    assert "test/scratch/0.png: 0_mask.png: it marks the whole frame" in warning
    frames = {frame.name: frame for frame in read_evaluation(tmp_path / "out").categories[0].frames}
    assert frames["test/scratch/0.png"].pixels == (0, 64 * 48)
    assert "values from 1 to 3" in (frames["test/scratch/1.png"].doubt or "")


def test_a_frame_behind_a_dead_link_is_not_inspected(
    bundle: Bundle, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "nut"
    shutil.copytree(dataset / "nut", folder)
    (folder / "test/scratch/9.png").symlink_to("/not/mounted/9.png")
    facts, _ = evaluated_as_json(bundle, folder, tmp_path / "out", capsys, status=3)
    assert facts["categories"]["nut"]["not_inspected"] == 1 and facts["categories"]["nut"]["frames"] == 6
