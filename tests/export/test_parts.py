"""The drawn parts: what is asked for is there, it can be seen, and the labels say where."""

from __future__ import annotations

from typing import get_args

import cv2
import numpy as np
import pytest

from vmad_edge.export.reference.parts import (
    FAMILIES,
    KINDS,
    PLACES,
    UNSEEN_FAMILIES,
    UNSEEN_KINDS,
    Kind,
    Part,
    draw,
    place,
    random_kind,
)

ALL_FAMILIES, ALL_KINDS = (*FAMILIES, *UNSEEN_FAMILIES), (*KINDS, *UNSEEN_KINDS)


def part(seed: int, family: str | None = None, *defects: Kind, size: int = 128) -> Part:
    return draw(np.random.default_rng([seed, 9]), family, defects, size)


def test_every_kind_is_either_trained_or_unseen() -> None:
    assert sorted(ALL_KINDS) == sorted(get_args(Kind)) and len(set(ALL_KINDS)) == 10
    assert len(set(ALL_FAMILIES)) == 12


@pytest.mark.parametrize("family", [None, *ALL_FAMILIES])
def test_a_part_follows_from_its_seed(family: str | None) -> None:
    first, again, other = (part(seed, family, "crack", "missing feature") for seed in (5, 5, 6))
    assert (first.image == again.image).all() and (first.kinds == again.kinds).all()
    assert first.object == again.object
    assert (first.image != other.image).any()


def test_drawing_leaves_the_global_generator_alone() -> None:
    before = np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    part(0, None, random_kind(np.random.default_rng(0)))
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index, union-attr]


@pytest.mark.parametrize("size", [64, 131, 256])
def test_image_and_labels_have_the_size_asked_for(size: int) -> None:
    for seed in range(4):  # colour and grey cameras, with JPEG's traces and without
        drawn = part(seed, None, "stain", size=size)
        assert drawn.image.shape == (size, size, 3) and drawn.image.dtype == np.uint8
        assert drawn.kinds.shape == (size, size) and drawn.kinds.dtype == np.uint8
        assert drawn.mask.shape == (size, size) and drawn.mask.dtype == bool


def test_a_quarter_of_the_cameras_is_grey_and_parts_are_good_without_defects() -> None:
    parts = [part(seed, size=64) for seed in range(120)]
    grey = sum(bool((p.image == p.image[..., :1]).all()) for p in parts)
    assert 15 <= grey <= 48  # binomial(120, 1/4): outside once in 10,000
    assert {p.object for p in parts} == set(FAMILIES)  # never one of the unseen, unless asked for
    assert not any(p.mask.any() or p.kind or p.place for p in parts)


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_labels_and_place_say_what_was_drawn(family: str, kind: Kind) -> None:
    for seed in range(3):
        drawn = part(seed, family, kind)
        assert (drawn.object, drawn.kind) == (family, kind)
        assert set(np.unique(drawn.kinds)) == {0, 1 + ALL_KINDS.index(kind)}
        assert 0.003 <= drawn.mask.mean() < 0.25
        moments = cv2.moments(drawn.mask.astype(np.uint8), binaryImage=True)
        x, y = moments["m10"] / moments["m00"] + 0.5, moments["m01"] / moments["m00"] + 0.5
        assert drawn.place == PLACES[int(3 * y / 128)][int(3 * x / 128)]


@pytest.mark.parametrize("kind", [kind for kind in ALL_KINDS if kind != "missing feature"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_defect_is_seen_in_its_mask_and_nowhere_else(family: str, kind: Kind) -> None:
    """Against the same photograph of the same part without it (a part that was drawn again is another: skip it)."""
    compared = 0
    for seed in range(5):
        bad, good = part(seed, family, kind, size=160), part(seed, family, size=160)
        change = np.abs(
            cv2.blur(bad.image.astype(np.float32), (3, 3)) - cv2.blur(good.image.astype(np.float32), (3, 3))
        )
        change = change.mean(2)
        if np.median(change) > 4:
            continue
        compared += 1
        inside, outside = change[bad.mask], change[~bad.mask]
        assert np.percentile(inside, 95) > 6
        assert inside.mean() > 3 * outside.mean()
    assert compared >= 3


@pytest.mark.parametrize(
    "family",
    # Not those told by their pattern alone: a gear's tooth, a thread, a component whose pads stay.
    ["plate", "connector", "blister", "wood", "tile", "cable", "leather"],
)
def test_a_missing_feature_looks_unlike_its_neighbours(family: str) -> None:
    """Within the mask the part is plainer than around other features: fewer strong edges than in the ring about it."""
    plainer = 0
    for seed in range(8):
        drawn = part(seed, family, "missing feature", size=192)
        edges = cv2.Canny(cv2.cvtColor(drawn.image, cv2.COLOR_RGB2GRAY), 40, 90) > 0
        core = cv2.erode(drawn.mask.astype(np.uint8), np.ones((7, 7), np.uint8)) > 0
        around = cv2.dilate(drawn.mask.astype(np.uint8), np.ones((61, 61), np.uint8)) > 0
        plainer += edges[core].mean() <= edges[around & ~drawn.mask].mean()
    assert plainer >= 6


def test_several_defects_on_one_part() -> None:
    wanted: tuple[Kind, ...] = ("missing feature", "stain", "scratch", "bubble")
    for seed in range(4):
        drawn = part(seed, None, *wanted)
        assert set(np.unique(drawn.kinds)) == {0, *(1 + ALL_KINDS.index(kind) for kind in wanted)}
        assert drawn.kind is None and drawn.place is None  # of several there is no one kind


@pytest.mark.parametrize(
    ("row", "column", "expected"),
    [
        (0, 0, "upper left"),
        (9, 10, "upper centre"),
        (0, 29, "upper right"),
        (10, 9, "centre left"),
        (15, 15, "centre"),
        (19, 20, "centre right"),
        (29, 0, "lower left"),
        (20, 19, "lower centre"),
        (29, 29, "lower right"),
    ],
)
def test_place_of_one_pixel(row: int, column: int, expected: str) -> None:
    mask = np.zeros((30, 30), bool)
    mask[row, column] = True
    assert place(mask) == expected
