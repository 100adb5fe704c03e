"""`vmad evaluate`: how well a bundle tells the defective frames of a labelled data set from the good ones.

OUT/
  settings.json                 of the run; another run's folder is refused
  CATEGORY/frames/NAME/         a frame's result.json, panel.jpg and scores.npy: whole or absent, so a run can go on
  CATEGORY/result.json          written last; the frames' scores.npy (4 bytes a pixel) go then
  results.json  index.html      all categories
  submission/                   maps of frames without labels, if asked for: see `submission`
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import IO, Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from vmad_edge.runtime import submission
from vmad_edge.runtime.bundle import Bundle, Record, Thresholds
from vmad_edge.runtime.dataset import Category, LabelledFrame, read_dataset
from vmad_edge.runtime.engines import Device
from vmad_edge.runtime.errors import VmadError
from vmad_edge.runtime.files import sha256, whole_folder, write_whole
from vmad_edge.runtime.frame import AS_STORED, Colour, Reading
from vmad_edge.runtime.inspection import Inspection, Reason, Verdict
from vmad_edge.runtime.inspector import Inspector
from vmad_edge.runtime.metrics import Scores, measure, pixel_scores
from vmad_edge.runtime.pictures import Pixels, fit, heated, joined, jpeg, outlined
from vmad_edge.runtime.station import Station

Shots: TypeAlias = int | Literal["all"]
Progress = Callable[[Sequence[LabelledFrame], str], Iterable[LabelledFrame]]
"""Gives the frames on, one by one, with a description to show."""
_R = TypeVar("_R", bound=Record)


class Settings(Record):
    bundle: str
    """Its hash."""
    dataset: str
    shots: Shots
    seed: int
    review: bool
    unlabelled: bool = False
    bit_depth: int | None = None
    colour: Colour = "rgb"

    @property
    def reading(self) -> Reading:
        return {"bit_depth": self.bit_depth, "colour": self.colour}


class FrameResult(Record):
    name: str
    defective: bool
    marked: bool
    """False: defective, but no mask says where. Such a frame counts for the image figures alone."""
    verdict: Verdict
    score: float | None
    p_yes: float | None
    reason: str | None
    reason_code: Reason | None = None
    regions: int
    """Of its mask."""
    pixels: tuple[int, int]
    """How many normal and defective ones scores.npy has."""
    doubt: str | None = None
    """What its mask may mean other than it was taken for."""
    made_of: tuple[str, str, str]
    """SHA-256 of the frame, of its mask (or nothing, or of several), and of all that was enrolled before it."""

    @property
    def unfit(self) -> bool:
        return self.reason_code is not None and self.reason_code.is_unfit


class Figures(Record):
    """The columns of VMAD's Table I and two more, as fractions; None where there is nothing to tell apart."""

    image_auroc: float | None
    image_ap: float | None
    image_f1_max: float | None
    pixel_auroc: float | None
    pixel_ap: float | None
    pixel_f1_max: float | None
    aupro: float | None
    p_yes_auroc: float | None
    """Of P(yes) alone; None without reviews."""


Curve = tuple[tuple[float, float], ...]


class CategoryResult(Record):
    name: str
    enrolled: int
    figures: Figures
    image_roc: Curve
    pixel_roc: Curve
    pro: Curve
    frames: tuple[FrameResult, ...]
    thresholds: Thresholds | None = None
    """That its verdicts are of; None: there were none, or an older result does not tell them."""
    left_out: str = ""
    """What lies in its folders and was not read, in words."""
    unlabelled: int = 0
    """Frames to test that have no labels; they are in no figure."""
    not_submitted: tuple[str, ...] = ()
    """Those of them that could not be inspected, with why: a submission lacks their maps."""

    @property
    def not_inspected(self) -> int:
        return sum(frame.verdict is Verdict.NOT_INSPECTED for frame in self.frames)

    def out_of_scope(self, defective: bool) -> int:
        """Good or defective frames that are unlike all that were enrolled."""
        return sum(f.reason_code is Reason.OUT_OF_SCOPE and f.defective is defective for f in self.frames)

    def unfit(self, defective: bool) -> int:
        """Good or defective frames that were refused before the screen saw them."""
        return sum(frame.unfit and frame.defective is defective for frame in self.frames)

    @property
    def unmarked(self) -> int:
        return sum(frame.defective and not frame.marked for frame in self.frames)


class Evaluation(Record):
    settings: Settings
    categories: tuple[CategoryResult, ...]

    @property
    def mean(self) -> Figures:
        """Each figure's mean over the categories that have it."""
        columns = {name: [getattr(c.figures, name) for c in self.categories] for name in Figures.model_fields}
        there = {name: [value for value in column if value is not None] for name, column in columns.items()}
        return Figures(**{name: float(np.mean(column)) if column else None for name, column in there.items()})


def evaluate(
    bundle: Bundle,
    dataset: Path,
    out: Path,
    *,
    shots: Shots = 0,
    seed: int = 0,
    review: bool = False,
    unlabelled: bool = False,
    categories: Iterable[str] = (),
    submit: bool = False,
    device: Device = "auto",
    reading: Reading = AS_STORED,
    progress: Progress = lambda frames, _: frames,
) -> Evaluation:
    """Inspect the frames to test of every category, keep what was found in `out`, and measure it.

    What an earlier run with the same settings left in `out` is not inspected again. A station's own references and
    calibration play no part.

    Args:
        shots: normal frames to enroll before a category, drawn with `seed`; 0 compares with the bundle's features.
        review: ask the language model about every frame too.
        unlabelled: enroll nothing; compare a category's frames to test with each other.
        reading: how the frames are read.
        submit: write the maps of frames without labels to `out`/submission too; those that are there are kept.

    Raises:
        VmadError: `out` belongs to another run, a category has fewer normal frames than `shots`, there are shots
            for an evaluation without labels, or nothing to submit.
        FrameError: the data set is not readable, see `read_dataset` and `LabelledFrame.read_mask`; too few frames to
            compare with each other.
    """
    if unlabelled and shots:
        raise VmadError(f"expected --shots 0 where frames are compared with each other, got {shots}")
    settings = Settings(
        bundle=bundle.hash,
        dataset=str(dataset.resolve()),
        shots=shots,
        seed=seed,
        review=review,
        unlabelled=unlabelled,
        **reading,
    )
    found = read_dataset(dataset, categories)
    if submit and (unlabelled or not any(category.unlabelled for category in found)):
        raise VmadError("expected frames without labels (MVTec AD 2) and thresholds for a submission, found none")
    out.mkdir(parents=True, exist_ok=True)
    earlier = _kept(out / "settings.json", Settings)
    if earlier != settings and any(out.iterdir()):
        raise VmadError(f"{out} {_difference(earlier, settings)}; choose another --out, or remove this one")
    write_whole(out / "settings.json", settings.model_dump_json(indent=2))
    with (
        tempfile.TemporaryDirectory() as nothing,
        Inspector(bundle, Station(Path(nothing), bundle), device) as inspector,
    ):
        results = []
        for category in found:
            prepare = cache(partial(_prepare, inspector, category, settings))
            result = _evaluate_category(inspector, category, settings, out / category.name, progress, prepare)
            lacking = _submit(inspector, category, reading, out / "submission", progress, prepare) if submit else ()
            results.append(result.model_copy(update={"not_submitted": lacking}))
    evaluation = Evaluation(settings=settings, categories=tuple(results))
    write_whole(out / "results.json", evaluation.model_dump_json(indent=2))
    return evaluation


def read_evaluation(folder: Path) -> Evaluation:
    """What `evaluate` wrote.

    Raises:
        VmadError: it is not there, or not complete.
    """
    if (found := _kept(folder / "results.json", Evaluation)) is None:
        raise VmadError(f"{folder} has no results.json of `vmad evaluate`; let it run to its end first")
    return found


def _prepare(inspector: Inspector, category: Category, settings: Settings) -> None:
    """Enroll what the category's frames are compared with."""
    name = _object(category)
    if settings.unlabelled:
        inspector.compare_unlabelled([frame.path for frame in category.test], object=name, **settings.reading)
    elif settings.shots:
        references = drawn(category, settings.shots, settings.seed)
        inspector.enroll(references, object=name, keep=False, **settings.reading)


def _object(category: Category) -> str:
    return category.name.replace("_", " ")


def _submit(
    inspector: Inspector,
    category: Category,
    reading: Reading,
    folder: Path,
    progress: Progress,
    prepare: Callable[[], None],
) -> tuple[str, ...]:
    """Write the maps of the category's frames without labels; those that were not inspected, with why."""
    lacking = []
    frames = [LabelledFrame(path.name, path, defective=False, mask=None) for path in category.unlabelled]
    for frame in progress(frames, f"{category.name}, without labels"):
        if submission.is_there(folder, category.name, frame.path):
            continue
        prepare()
        inspection = inspector.inspect(frame.path, object=_object(category), review=False, **reading)
        thresholds = inspector.thresholds(_object(category))
        if inspection.map is None or thresholds is None:
            lacking.append(f"{frame.path}: {inspection.reason}")
        else:
            submission.write(folder, category.name, frame.path, inspection.map, thresholds.defect_above)
    return tuple(lacking)


def _evaluate_category(
    inspector: Inspector,
    category: Category,
    settings: Settings,
    folder: Path,
    progress: Progress,
    prepare: Callable[[], None],
) -> CategoryResult:
    references = drawn(category, settings.shots, settings.seed)
    known = [frame.path for frame in category.test] if settings.unlabelled else references
    enrolled = _all(map(_hash, known))
    made_of = {frame.name: (_hash(frame.path), _mask_hash(frame), enrolled) for frame in category.test}
    beside: dict[str, object] = {"left_out": category.left_out, "unlabelled": len(category.unlabelled)}
    before = _kept(folder / "result.json", CategoryResult)
    if before is not None and {frame.name: frame.made_of for frame in before.frames} == made_of:
        return before.model_copy(update=beside)
    name = _object(category)
    for frame in progress(category.test, category.name):
        place = folder / "frames" / frame.name
        kept = _kept(place / "result.json", FrameResult)
        if kept is not None and kept.made_of == made_of[frame.name] and (place / "scores.npy").exists():
            continue
        prepare()
        inspection = inspector.inspect(frame.path, object=name, review=False, **settings.reading)
        if settings.review and inspection.features is not None:
            inspection = inspector.review(inspection).wait()
        _keep_frame(place, frame, inspection, made_of[frame.name], inspector.thresholds(name))
    results = [
        FrameResult.model_validate_json((folder / "frames" / frame.name / "result.json").read_text("utf-8"))
        for frame in category.test
    ]
    prepare()
    beside["thresholds"] = inspector.thresholds(name)
    result = _measured(category.name, len(references), results, folder).model_copy(update=beside)
    write_whole(folder / "result.json", result.model_dump_json())
    for frame in category.test:
        (folder / "frames" / frame.name / "scores.npy").unlink()
    return result


def _hash(path: Path) -> str:
    """SHA-256 of a file; nothing if it cannot be read, which its inspection will say."""
    try:
        return sha256(path)
    except OSError:
        return ""


def _mask_hash(frame: LabelledFrame) -> str:
    hashes = [_hash(path) for path in frame.mask_files]
    return hashes[0] if len(hashes) == 1 else _all(hashes) if hashes else ""


def _all(hashes: Iterable[str]) -> str:
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def drawn(category: Category, shots: Shots, seed: int) -> list[Path]:
    """The normal frames to enroll: for a seed, more shots include those of fewer.

    Raises:
        VmadError: the category has fewer.
    """
    count = len(category.train) if shots == "all" else shots
    if count > len(category.train):
        raise VmadError(
            f"{category.name} has {len(category.train)} normal frames to enroll; --shots {count} asks for more"
        )
    order = np.random.default_rng(seed).permutation(len(category.train))
    return [category.train[i] for i in sorted(order[:count])]


def _keep_frame(
    place: Path,
    frame: LabelledFrame,
    inspection: Inspection,
    made_of: tuple[str, str, str],
    thresholds: Thresholds | None,
) -> None:
    scores, regions, mask = np.zeros(0, np.float32), 0, None
    pixels = 0, 0
    doubts: list[str] = []
    if inspection.map is not None:
        mask = frame.read_mask(inspection.map.shape, doubts.append)
        if mask is not None:
            found, regions = pixel_scores(inspection.map, mask)
            pixels = len(found.normal), len(found.defective)
            scores = np.concatenate([found.normal, found.defective, found.share], dtype=np.float32)
    result = FrameResult(
        name=frame.name,
        defective=frame.defective,
        marked=mask is not None and frame.defective,
        verdict=inspection.verdict,
        score=inspection.score,
        p_yes=inspection.p_yes,
        reason=inspection.reason,
        reason_code=inspection.reason_code,
        regions=regions,
        pixels=pixels,
        made_of=made_of,
        doubt=doubts[0] if doubts else None,
    )
    with whole_folder(place) as folder:
        np.save(folder / "scores.npy", scores)
        if inspection.map is not None:
            (folder / "panel.jpg").write_bytes(jpeg(_panel(inspection, mask, thresholds)))
        (folder / "result.json").write_text(result.model_dump_json(indent=2), "utf-8")


def _panel(inspection: Inspection, mask: NDArray[np.bool_] | None, thresholds: Thresholds | None) -> Pixels:
    """The frame with its true mask's outline, and the frame under its map's colours."""
    left = fit(outlined(inspection.frame.pixels, mask))
    return joined([left, heated(inspection, fit(inspection.frame.pixels), thresholds)])


def _measured(name: str, enrolled: int, frames: Sequence[FrameResult], folder: Path) -> CategoryResult:
    image = measure([_image_scores(frames, lambda frame: frame.score)])
    p_yes = measure([_image_scores(frames, lambda frame: frame.p_yes)])
    marked = [frame for frame in frames if sum(frame.pixels)]
    with tempfile.TemporaryFile(dir=folder) as scratch:
        pixel = measure(_pixel_scores(marked, folder, scratch), sum(frame.regions for frame in marked))
    figures = Figures(
        image_auroc=image.auroc,
        image_ap=image.ap,
        image_f1_max=image.f1_max,
        pixel_auroc=pixel.auroc,
        pixel_ap=pixel.ap,
        pixel_f1_max=pixel.f1_max,
        aupro=pixel.aupro,
        p_yes_auroc=p_yes.auroc,
    )
    return CategoryResult(
        name=name,
        enrolled=enrolled,
        figures=figures,
        image_roc=image.roc,
        pixel_roc=pixel.roc,
        pro=pixel.pro,
        frames=tuple(frames),
    )


def _image_scores(frames: Sequence[FrameResult], value: Callable[[FrameResult], float | None]) -> Scores:
    good, bad = (
        np.sort(
            np.array([value(frame) for frame in frames if frame.defective is side and value(frame) is not None], float)
        )
        for side in (False, True)
    )
    return Scores(good, bad)


def _pixel_scores(frames: Sequence[FrameResult], folder: Path, scratch: IO[bytes]) -> list[Scores]:
    """All frames' scores in one file and not in memory, read through one map of it."""
    if not frames:
        return []
    lengths = [(normal, defective, defective) for normal, defective in (frame.pixels for frame in frames)]
    pixels = np.memmap(scratch, np.float32, "w+", shape=(sum(map(sum, lengths)),))
    parts, start = [], 0
    for frame, three in zip(frames, lengths, strict=True):
        stored = np.load(folder / "frames" / frame.name / "scores.npy")
        pixels[start : start + len(stored)] = stored
        ends = start + np.cumsum(three)
        parts.append(Scores(*np.split(pixels[start : ends[-1]], ends[:-1] - start)))
        start = int(ends[-1])
    return parts


def _kept(path: Path, kind: type[_R]) -> _R | None:
    """What an earlier run wrote, if it is there and whole."""
    try:
        return kind.model_validate_json(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _difference(earlier: Settings | None, settings: Settings) -> str:
    if earlier is None:
        return "is not empty and holds no evaluation"
    pairs = zip(Settings.model_fields, vars(earlier).values(), vars(settings).values(), strict=True)
    return "holds another evaluation: " + ", ".join(f"{name} {a}, now {b}" for name, a, b in pairs if a != b)


class Flip(Record):
    frame: str
    defective: bool
    before: Verdict
    after: Verdict


class Comparison(Record):
    """Of two evaluations, for one category: figures, the second's minus the first's, and verdicts that changed."""

    name: str
    frames: int
    first: Figures
    second: Figures
    difference: dict[str, float | None]
    flipped: tuple[Flip, ...]


def compare(first: Evaluation, second: Evaluation) -> list[Comparison]:
    """What changed between two bundles on the same frames, in the categories that both evaluations have.

    Raises:
        VmadError: no category in common, or one whose frames or masks are not the same.
    """
    others = {category.name: category for category in second.categories}
    pairs = [(category, others[category.name]) for category in first.categories if category.name in others]
    if not pairs:
        raise VmadError("expected two evaluations with a category in common, found none")
    return [_compared(*pair) for pair in pairs]


def _compared(first: CategoryResult, second: CategoryResult) -> Comparison:
    if {f.name: f.made_of[:2] for f in first.frames} != {f.name: f.made_of[:2] for f in second.frames}:
        raise VmadError(f"{first.name}: the two evaluations saw different frames or masks; evaluate both again")
    difference: dict[str, float | None] = {}
    for name in Figures.model_fields:
        a, b = getattr(first.figures, name), getattr(second.figures, name)
        difference[name] = None if a is None or b is None else b - a
    after = {frame.name: frame.verdict for frame in second.frames}
    flipped = tuple(
        Flip(frame=frame.name, defective=frame.defective, before=frame.verdict, after=after[frame.name])
        for frame in first.frames
        if after[frame.name] is not frame.verdict
    )
    return Comparison(
        name=first.name,
        frames=len(first.frames),
        first=first.figures,
        second=second.figures,
        difference=difference,
        flipped=flipped,
    )
