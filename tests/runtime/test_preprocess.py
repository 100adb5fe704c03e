"""`clip_pixels` and `sam_pixels` against transformers' own processors, to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
from examples import MEAN, STD, clip_input
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from vmad_edge.runtime.bundle import SamInput
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.stages.preprocess import View, clip_pixels, sam_pixels

SIZES = [(64, 64), (300, 200), (200, 301), (37, 500), (33, 47), (1000, 999)]


def frame_of(height: int, width: int) -> Frame:
    rng = np.random.default_rng(height * 1000 + width)
    small = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), np.uint8)
    return Frame(np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)), "test")


@pytest.mark.parametrize("height,width", SIZES)
@pytest.mark.parametrize("resample,pil", [("bicubic", 3), ("bilinear", 2), ("lanczos", 1)])
def test_exact_resize_equals_transformers(height: int, width: int, resample: str, pil: int) -> None:
    frame = frame_of(height, width)
    processor = CLIPImageProcessorPil(
        size={"height": 56, "width": 56}, do_center_crop=False, resample=pil, image_mean=MEAN, image_std=STD
    )
    expected = processor(Image.fromarray(frame.pixels), return_tensors="np")["pixel_values"]
    pixels, view = clip_pixels(frame, clip_input(resample=resample))
    np.testing.assert_array_equal(pixels, expected)
    assert view == View(0, 0, width, height)


@pytest.mark.parametrize("height,width", SIZES)
def test_centre_crop_equals_transformers(height: int, width: int) -> None:
    frame = frame_of(height, width)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_mean=MEAN, image_std=STD
    )
    expected = processor(Image.fromarray(frame.pixels), return_tensors="np")["pixel_values"]
    pixels, view = clip_pixels(frame, clip_input("shortest_edge"))
    np.testing.assert_array_equal(pixels, expected)
    assert min(height, width) == pytest.approx(max(view.right - view.left, view.bottom - view.top), rel=0.02)


@pytest.mark.parametrize("height,width", [(300, 200), (200, 300), (100, 100), (2400, 1800), (1800, 2401), (3000, 31)])
def test_padding_is_llavas_expand2square(height: int, width: int) -> None:
    frame = frame_of(height, width)
    side = max(height, width)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = [int(value * 255) for value in MEAN]
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = frame.pixels
    expected, _ = clip_pixels(Frame(square, "square"), clip_input())
    pixels, view = clip_pixels(frame, clip_input(pad=True))
    np.testing.assert_array_equal(pixels, expected)
    assert view == View(-left, -top, side - left, side - top)


@pytest.mark.parametrize("height,width", SIZES)
def test_sam_pixels_equal_transformers(height: int, width: int) -> None:
    frame = frame_of(height, width)
    processor = SamImageProcessorPil(size={"longest_edge": 128}, pad_size={"height": 128, "width": 128})
    expected = processor(Image.fromarray(frame.pixels), return_tensors="np")
    pixels, covered = sam_pixels(frame, SamInput(size=128))
    # transformers works on values of 0…1 with rounded constants, segment-anything (and this project) on 0…255.
    np.testing.assert_allclose(pixels, expected["pixel_values"], atol=2e-6)
    assert covered == tuple(expected["reshaped_input_sizes"][0])


@pytest.mark.parametrize("height,width", [(8, 800), (800, 8), (40, 4000)])
def test_the_thinnest_frames_have_pixels(height: int, width: int) -> None:
    for spec in (clip_input(), clip_input("shortest_edge"), clip_input(pad=True)):
        assert np.isfinite(clip_pixels(frame_of(height, width), spec)[0]).all()
    assert min(sam_pixels(frame_of(height, width), SamInput(size=32))[1]) >= 1


def test_a_thin_frames_padding_is_never_there_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    new, largest = Image.new, [0]

    def watched(mode: str, size: tuple[int, int], colour: tuple[int, int, int] = (0, 0, 0)) -> Image.Image:
        largest[0] = max(largest[0], size[0] * size[1])
        return new(mode, size, colour)

    monkeypatch.setattr(Image, "new", watched)
    clip_pixels(Frame(np.zeros((600, 60_000, 3), np.uint8), "line scan"), clip_input(pad=True))
    assert 0 < largest[0] <= 60_000 * 600  # the frame itself, of 3,600 million
