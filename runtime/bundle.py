"""The bundle: the only thing that passes from export to runtime. Its manifest is defined here and nowhere else.

bundle/
  manifest.sha256       SHA-256 of manifest.json: the bundle's hash
  manifest.json         the Manifest below; lists every other file with its SHA-256
  clip_encoder.onnx     ltc_projector.onnx  sam_encoder.onnx  mask_decoder.onnx  (+ .onnx.data when large)
  llm.gguf              the language model with its LoRA merged
  similarity.safetensors  DSSL's normal features
  parity.json           source against export, as measured when the bundle was made
  parity.html           the same for people, with pictures

A bundle that screens only (`vmad export-features`) has the manifest and clip_encoder.onnx alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, BinaryIO, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from vmad_edge.kernels import Dtype
from vmad_edge.runtime.errors import BundleError, VmadError
from vmad_edge.runtime.files import sha256_of

MANIFEST = "manifest.json"
MANIFEST_HASH = "manifest.sha256"
_MOST_NUMBERS = 1 << 30
"""In `patches_multi`: 4 GiB. ViT-H's at 1024 px are 21 million."""
_LARGEST_MANIFEST = 1 << 20
"""Bytes."""

# The limits lie beyond every model of today: what passes them is a mistake, or an attack.
Side = Annotated[int, Field(gt=0, le=8192)]
"""Pixels."""
Width = Annotated[int, Field(gt=0, le=65_536)]
Tokens = Annotated[int, Field(gt=0, le=1 << 20)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 20)]
TokenIds = Annotated[tuple[TokenId, ...], Field(min_length=1, max_length=256)]
Mean = Annotated[float, Field(ge=-255, le=255)]
Std = Annotated[float, Field(ge=1e-3, le=255)]
Triple = tuple[Mean, Mean, Mean]
Stds = tuple[Std, Std, Std]
Level = Annotated[int, Field(ge=-1000, le=1000)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
Text = Annotated[str, Field(max_length=20_000)]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=200)]
"""Of a file in the bundle itself."""
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Answer = Literal["full", "short"]
Precision = Literal["fp32", "fp16", "int8"]
SpacePrefix = Literal["first", "always", "never"]


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def first_fault(error: ValidationError) -> tuple[str, str]:
    """Where a Record's JSON goes wrong first, and what was expected there and found."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"]).encode("unicode_escape").decode() or "the file"
    if first["type"] == "json_invalid":
        return where, "expected JSON, found something else"
    found = "" if first["type"] in ("missing", "value_error") else f", found {first['input']!r:.80}"
    return where, first["msg"].removeprefix("Value error, ") + found


class ClipInput(Record):
    """CLIP's preprocessing, taken from the checkpoint's preprocessor_config.json."""

    size: Side
    """S_c: side of `clip_pixels` in pixels."""
    resize: Literal["exact", "shortest_edge"]
    """`exact`: both sides to S_c. `shortest_edge`: the shorter side to S_c, then a centre crop: borders are lost."""
    pad_to_square: bool
    """Pad the shorter side with the mean colour first (LLaVA's image_aspect_ratio "pad")."""
    resample: Literal["bilinear", "bicubic", "lanczos"]
    rescale_factor: Annotated[float, Field(ge=1e-6, le=1)]
    mean: Triple
    std: Stds


class SamInput(Record):
    """SAM's preprocessing: longest side to `size` (Pillow, bilinear), normalise, pad right and bottom with zeros."""

    size: Side
    mean: Triple = (123.675, 116.28, 103.53)
    std: Stds = (58.395, 57.12, 57.375)


class Vision(Record):
    grid: Annotated[int, Field(gt=0, le=512)]
    """Patches per side; N = grid²."""
    width: Width
    """D."""
    patches_level: Level | None = None
    """Index into hidden_states (0 = embeddings, negative from the end) of `patches`; LLaVA reads −2. None: `patches`
    joins the levels."""
    levels: Annotated[tuple[Level | Name, ...], Field(min_length=1, max_length=64)]
    """Indices of `patches_multi`, in the order that the LTC projector takes them; or a feature graph's outputs."""

    @model_validator(mode="after")
    def _levels(self) -> Vision:
        _refuse_twice("levels", self.levels)
        if (numbers := self.grid**2 * self.width * len(self.levels)) > _MOST_NUMBERS:
            raise ValueError(f"expected at most {_MOST_NUMBERS} numbers of a frame's patches, found {numbers}")
        return self


class Conversation(Record):
    template: Text
    """The whole prompt with one `<image>` and one `{question}`."""
    question: Text
    """The default question, with `{object}` where the part's name goes."""
    object: Name = "part"
    short_answer: Text = "Yes"
    """Teacher-forced in answer mode `short`, up to the state that `<seg>` needs."""

    @model_validator(mode="after")
    def _places(self) -> Conversation:
        if self.template.count("<image>") != 1 or self.template.count("{question}") != 1:
            raise ValueError("template needs exactly one <image> and one {question}")
        return self


class Llama(Record):
    """How llama.cpp runs the language model."""

    gpu_layers: Annotated[int, Field(ge=-1, le=10_000)] = -1
    """Layers that lie on the GPU, where there is one; −1: all. Fewer take less of its memory, and longer."""
    flash_attention: bool | None = None
    """None: where llama.cpp finds that it helps."""
    kv_type: Literal["f32", "f16", "q8_0"] = "f16"
    """Of the KV cache. q8_0 halves F16 and moves the states by some hundredths."""

    @model_validator(mode="after")
    def _quantized_cache(self) -> Llama:
        if self.kv_type == "q8_0" and not self.flash_attention:
            raise ValueError("kv_type q8_0 needs flash_attention true")
        return self


class Language(Record):
    width: Width
    """H."""
    visual_tokens: Tokens
    """K."""
    context_length: Tokens
    """Tokens of prompt, image and answer together; the KV cache has room for as many."""
    vocabulary: Tokens
    space_prefix: SpacePrefix = "first"
    """Where the tokenizer puts a ▁ of its own: before a text, also after each special token in it, nowhere."""
    quantization: Literal["f32", "f16", "q8_0", "q4_k_m"]
    seg_token: Name
    seg_token_id: TokenId
    seg_state: Literal["emitting", "token"]
    """Which hidden state is h_seg: of the step whose logits emit `<seg>` (LISA), or of `<seg>` itself."""
    yes_token_ids: TokenIds
    no_token_ids: TokenIds
    max_new_tokens: Tokens
    answer: Answer = "full"
    llama: Llama = Llama()

    @model_validator(mode="after")
    def _tokens(self) -> Language:
        ids = (self.seg_token_id, *self.yes_token_ids, *self.no_token_ids)
        _refuse_twice("seg_token_id, yes_token_ids and no_token_ids", ids)
        if max(ids) >= self.vocabulary:
            raise ValueError(f"expected token ids below the vocabulary, {self.vocabulary}, found {max(ids)}")
        if (least := self.visual_tokens + self.max_new_tokens + 1) > self.context_length:
            raise ValueError(
                f"visual_tokens, max_new_tokens and a prompt are at least {least} tokens, more than context_length, "
                f"{self.context_length}"
            )
        return self


Score = Annotated[float, Field(ge=-0.01, le=10)]
"""What a score can reach: (1 − w) · 1 + w · gain · 2 against references, 2 otherwise; rounding may end below 0."""


class Thresholds(Record):
    """score < good_below: GOOD. score ≥ defect_above: DEFECT. Between: UNCERTAIN."""

    good_below: Score
    defect_above: Score

    @model_validator(mode="after")
    def _order(self) -> Thresholds:
        if not self.good_below <= self.defect_above:
            raise ValueError(f"good_below {self.good_below} exceeds defect_above {self.defect_above}")
        return self


class ReviewRule(Record):
    """What a review makes of what the screen leaves UNCERTAIN. Without a rule it explains, and settles nothing."""

    good_below: FiniteFloat | None
    """P(yes) < good_below: GOOD. None: never."""
    defect_above: FiniteFloat | None
    """P(yes) ≥ defect_above: DEFECT. None: never."""
    question: str | None = None
    """That P(yes) answers; None: the manifest's."""


MAKERS_RULE = ReviewRule(good_below=0.5, defect_above=0.5)


def makers_rule(thresholds: Thresholds | None) -> ReviewRule | None:
    """Of a bundle whose maker gave it these thresholds, for objects that nobody enrolled or calibrated."""
    return None if thresholds is None else MAKERS_RULE


class Similarity(Record):
    score_rule: Literal["max", "mean_top_1_percent"] = "mean_top_1_percent"
    """Image score from patch scores: the largest (MuSc, WinCLIP) or the mean of the top 1% (AnomalyDINO)."""
    temperature: Annotated[float, Field(ge=1e-3, le=100)] = 0.07
    """Of the softmax between normal and abnormal features, where the bundle has abnormal ones."""
    reference_weight: Annotated[float, Field(gt=0, le=1)] = 0.85
    """Of enrolled references beside normal and abnormal features (FADE's few-shot weight); 1: references alone."""
    reference_gain: Annotated[float, Field(gt=0, le=4)] = 1.75
    """What a distance to the references, 1 − cosine, counts beside that softmax (FADE: 3.5 · (1 − cosine) / 2)."""
    smoothing_sigma: Annotated[float, Field(ge=0, le=256)] = 4.0
    """Gaussian on the anomaly map, in pixels of `clip_pixels` (AnomalyCLIP: 4)."""
    coreset: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the enrolled patches that `enroll` keeps: PatchCore's greedy coreset below 1."""
    bank_dtype: Dtype = "float32"
    """How enrolled patches are kept for comparison: reduced ones are compared faster, on most processors."""
    thresholds: Thresholds | None = None
    """For the bundle's normal features, from the training's held-out normals; without them: UNCERTAIN."""

    @model_validator(mode="after")
    def _reached(self) -> Similarity:
        if self.thresholds is not None and self.thresholds.defect_above > 2:
            raise ValueError("thresholds: expected at most 2, which no score of normal features exceeds")
        return self


class Weights(Record):
    origin: Text
    licence: Text


class ScreenManifest(Record):
    """What the screen needs to know: all there is to a bundle without a review."""

    schema_version: Literal[1] = 1
    system: Literal["vmad", "patchcore"] = "patchcore"
    made_with: Annotated[dict[Name, Name], Field(max_length=100)]
    """Versions of what wrote the bundle."""
    weights: Weights
    clip: ClipInput
    vision: Vision
    similarity: Similarity
    precision: Annotated[dict[Name, Precision], Field(max_length=100)] = Field(default_factory=dict)
    """Of the graphs, by name; one that is not named computes in FP32. OpenVINO takes bf16 for fp16, and beside int8."""
    dynamic_axes: Annotated[dict[Name, Annotated[int, Field(gt=0, le=4096)]], Field(max_length=100)] = Field(
        default_factory=lambda: {"batch": 8, "prompts": 4}
    )
    """The largest size of each axis that the graphs leave open, by its name there; TensorRT plans are built for 1 up to
    that."""
    files: Annotated[dict[FileName, Sha256], Field(max_length=1000)]
    """Every other file of the bundle and its SHA-256."""
    needed: ClassVar[tuple[str, ...]] = ("clip_encoder.onnx",)
    """Files without which no bundle of its kind does anything."""

    @model_validator(mode="after")
    def _fits(self) -> ScreenManifest:
        if self.vision.grid > self.clip.size:
            raise ValueError(f"vision.grid, {self.vision.grid}, has more patches a side than clip.size has pixels")
        if unknown := [name for name in self.precision if self.files and f"{name}.onnx" not in self.files]:
            raise ValueError(f"precision names {', '.join(unknown)}, which no graph among the files is called")
        return self

    @property
    def object(self) -> str:
        """What a part is called that nobody named."""
        return "part"


class Manifest(ScreenManifest):
    system: Literal["vmad"] = "vmad"
    sam: SamInput
    conversation: Conversation
    language: Language
    needed: ClassVar[tuple[str, ...]] = (
        *("clip_encoder.onnx", "ltc_projector.onnx", "sam_encoder.onnx", "mask_decoder.onnx"),
        *("llm.gguf", "similarity.safetensors"),
    )

    @property
    def object(self) -> str:
        return self.conversation.object


Identity = tuple[int, ...]
"""Of a file, and of the link that it may be: another file has another, and so has the same file after a change."""


@dataclass(frozen=True)
class Bundle:
    """A verified bundle folder. `Bundle.open` is the only way to one."""

    path: Path
    hash: str
    manifest: ScreenManifest
    hashed: Mapping[str, Identity] | None = field(default=None, repr=False, compare=False)
    """All that is in the folder, as it was when it was hashed; None: it is being written."""

    @staticmethod
    def open(path: Path | str, expected: str | None = None) -> Bundle:
        """Check the manifest's hash, parse it, check every file's hash, return the bundle.

        Args:
            expected: the hash of the one bundle that is wanted.

        Raises:
            BundleError: not a bundle, or another one; a changed, missing or extra file, or one that is no file of the
                folder's own; a manifest of another schema, or past a limit of its Records.
        """
        try:
            folder = Path(os.path.realpath(path))  # what is read later is read from here, wherever a link leads by then
            with _held(folder) as (held, hashed):
                text = _read_small(held, MANIFEST)
                sealed = _read_small(held, MANIFEST_HASH).decode("ascii", "replace").strip()
                found = hashlib.sha256(text).hexdigest()
                if found != sealed:
                    raise BundleError(
                        f"{folder / MANIFEST} was changed: {MANIFEST_HASH} says {sealed[:16]}…, the file has "
                        f"{found[:16]}…. Copy the bundle again from where it was exported."
                    )
                if expected is not None and found != expected:
                    raise BundleError(
                        f"{folder} holds another bundle by now: expected {expected[:16]}…, found {found[:16]}…. Start "
                        "what inspects with it again, or put the earlier bundle back."
                    )
                manifest = _parse(folder / MANIFEST, text)
                _check_files(folder, held, manifest.files, hashed.keys())
        except (OSError, ValueError) as error:  # a path with a zero byte is a ValueError
            said = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else str(error)
            raise BundleError(
                f"{path} is not a bundle: expected a folder with {MANIFEST} and {MANIFEST_HASH} ({said}). "
                "`vmad export` makes bundles."
            ) from None
        return Bundle(folder, found, manifest, hashed)

    @property
    def for_review(self) -> Manifest:
        """The manifest of a bundle that can review.

        Raises:
            BundleError: this one screens only.
        """
        if not isinstance(self.manifest, Manifest):
            raise BundleError(
                f"bundle {self.path} screens only: it has no language model to review with. "
                "`vmad export` makes bundles that review."
            )
        return self.manifest

    def file(self, name: str) -> Path:
        """Path of a file that the manifest lists.

        Raises:
            BundleError: the manifest does not list it.
        """
        if name not in self.manifest.files:
            raise BundleError(f"bundle {self.path} has no {name}; it lists {', '.join(sorted(self.manifest.files))}")
        return self.path / name

    @contextmanager
    def opened(self, name: str) -> Iterator[Path]:
        """Where to load a file from while the block runs: what is loaded is what was hashed.

        The path leads through the open folder, so another one in its place is not seen. What changes in the folder
        until the block has ended is an error. A library that maps the file sees what is written into it later: nobody
        can prevent that but who may write there.

        Raises:
            BundleError: the manifest does not list it, or something in the folder is not what was hashed.
        """
        self.file(name)
        with _held(self.path, self.hashed) as (held, _):
            through = Path(f"/proc/self/fd/{held}")
            try:
                yield through / name
            except VmadError as error:
                error.args = (str(error).replace(str(through), str(self.path)),)
                raise


@contextmanager
def _held(path: Path, expected: Mapping[str, Identity] | None = None) -> Iterator[tuple[int, Mapping[str, Identity]]]:
    """An open folder, and what is in it: the same until the block has ended, and the same as `expected`.

    Raises:
        BundleError: something else, or no folder.
    """
    try:
        held = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        said = f"{path} is not a bundle: expected a folder ({error.strerror})"
        raise BundleError(f"{said}. `vmad export` makes bundles.") from None
    try:
        found = _identities(held)
        _refuse_change(path, found if expected is None else expected, found)
        try:
            yield held, found
        finally:  # a library that could not load the file may have seen another
            _refuse_change(path, found, _identities(held))
    finally:
        os.close(held)


def _identities(folder: int) -> dict[str, Identity]:
    return {name: _identity(folder, name) for name in os.listdir(folder)}


def _identity(folder: int, name: str) -> Identity:
    found: list[int] = []
    for follow in (False, True):
        with suppress(OSError):  # a link to nowhere, or a file that just went
            about = os.stat(name, dir_fd=folder, follow_symlinks=follow)
            found += (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
    return tuple(found)


def _refuse_change(path: Path, expected: Mapping[str, Identity], found: Mapping[str, Identity]) -> None:
    names = {name for name, _ in expected.items() ^ found.items()}
    if names:
        raise BundleError(
            f"bundle {path} was changed after its files were checked: {', '.join(sorted(names))}. Leave it alone, and "
            "start what inspects with it again."
        )


def _check_files(folder: Path, held: int, files: Mapping[str, str], present: Collection[str]) -> None:
    """All that the manifest lists is there, nothing else is, and every file has its hash."""
    listed = {*files, MANIFEST, MANIFEST_HASH}
    for what, names in (
        ("lacks", listed.difference(present)),
        ("has files its manifest does not list:", set(present) - listed),
    ):
        if names:
            raise BundleError(f"bundle {folder} {what} {', '.join(sorted(names))}. Copy it again, whole.")
    for name, digest in files.items():
        with _open_file(held, name) as file:
            found = sha256_of(file)
        if found != digest:
            raise BundleError(
                f"{folder / name} was changed: the manifest says {digest[:16]}…, the file has {found[:16]}…. "
                "Copy the bundle again from where it was exported."
            )


@contextmanager
def _open_file(folder: int, name: str) -> Iterator[BinaryIO]:
    """A file of an open folder.

    Raises:
        BundleError: it is no file, or a link to one elsewhere.
        OSError: it cannot be read.
    """
    inside = Path(f"/proc/self/fd/{folder}").readlink()
    if not stat.S_ISREG(os.stat(name, dir_fd=folder).st_mode):
        raise BundleError(f"{inside / name} is no file: every part of a bundle is one. Copy the bundle again.")
    opened = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)  # by now a FIFO, it would wait
    with os.fdopen(opened, "rb") as file:
        place = Path(f"/proc/self/fd/{opened}").readlink()
        if place.parent != inside:
            raise BundleError(
                f"{inside / name} is a link to {place}: expected a file in the bundle itself. Copy the bundle again, "
                "with `cp -L`."
            )
        yield file


def _read_small(folder: int, name: str) -> bytes:
    with _open_file(folder, name) as file:
        text = file.read(_LARGEST_MANIFEST + 1)
    if len(text) > _LARGEST_MANIFEST:
        raise BundleError(f"{name}: expected at most {_LARGEST_MANIFEST} bytes, found more. Export the bundle again.")
    return text


def seal(folder: Path, manifest: ScreenManifest) -> str:
    """Write manifest.json and manifest.sha256 into `folder`; returns the bundle's hash."""
    text = (manifest.model_dump_json(indent=2) + "\n").encode()
    digest = hashlib.sha256(text).hexdigest()
    (folder / MANIFEST).write_bytes(text)
    (folder / MANIFEST_HASH).write_text(digest + "\n")
    return digest


class _Kind(BaseModel):
    system: str = "vmad"


def _parse(path: Path, text: bytes) -> ScreenManifest:
    try:
        kind = ScreenManifest if _Kind.model_validate_json(text).system == "patchcore" else Manifest
        manifest = kind.model_validate_json(text, strict=True)
        json.loads(text, object_pairs_hook=_refuse_twice_in_json)  # of such, pydantic takes the last
    except ValidationError as error:
        where, what = first_fault(error)
        advice = "This bundle needs a newer vmad-edge." if where == "schema_version" else "Export it again."
        raise BundleError(f"{path}: {where}: {what}. {advice}") from None
    except ValueError as error:
        raise BundleError(f"{path}: {error}. Export it again.") from None
    if lacking := set(kind.needed) - manifest.files.keys():
        raise BundleError(f"{path}: files: expected {', '.join(sorted(lacking))} too. Export it again.")
    return manifest


def _refuse_twice_in_json(pairs: list[tuple[str, object]]) -> None:
    _refuse_twice("the names in an object", [name for name, _ in pairs])


def _refuse_twice(what: str, values: Sequence[object]) -> None:
    if twice := [value for value, count in Counter(values).items() if count > 1]:
        raise ValueError(f"expected each of {what} once, found {twice[0]!r:.80} twice")
