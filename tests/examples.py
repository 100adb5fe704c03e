"""Small valid records that tests share."""

from __future__ import annotations

from vmad_edge.runtime.bundle import ClipInput, Thresholds
from vmad_edge.runtime.station import Calibration

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def clip_input(resize: str = "exact", pad: bool = False, resample: str = "bicubic", size: int = 56) -> ClipInput:
    fields = {"size": size, "resize": resize, "pad_to_square": pad, "resample": resample}
    return ClipInput.model_validate({**fields, "rescale_factor": 1 / 255, "mean": MEAN, "std": STD})


MANIFEST: dict[str, object] = {
    "made_with": {"vmad-edge": "0"},
    "weights": {"origin": "made up", "licence": "none"},
    "clip": {
        "size": 28,
        "resize": "exact",
        "pad_to_square": False,
        "resample": "bicubic",
        "rescale_factor": 1 / 255,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    },
    "sam": {"size": 64},
    "vision": {"grid": 2, "width": 8, "patches_level": -2, "levels": [-1, -2]},
    "conversation": {"template": "USER: <image>\n{question} ASSISTANT:", "question": "Is the {object} broken?"},
    "language": {
        "width": 16,
        "visual_tokens": 1,
        "context_length": 64,
        "vocabulary": 300,
        "quantization": "f16",
        "seg_token": "<seg>",
        "seg_token_id": 299,
        "seg_state": "emitting",
        "yes_token_ids": [1],
        "no_token_ids": [2],
        "max_new_tokens": 8,
    },
    "similarity": {},
}

CALIBRATION = Calibration(
    bundle="ab" * 32,
    bank=None,
    object="M3 screw",
    thresholds=Thresholds(good_below=0.1, defect_above=0.2),
    promise="none",
    by="somebody",
    when="2026-01-01T00:00:00+0000",
    frames=(),
)
