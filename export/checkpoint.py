"""What a trained model looks like on disk.

checkpoint/
  config.json                 the Config below
  vision/                     CLIPVisionModel + preprocessor_config.json
  language/                   LlamaForCausalLM + tokenizer
  adapter/                    PEFT LoRA; absent where it is merged into language/ already
  projector.safetensors       LTC (models/ltc.py)
  segmenter/                  SamModel, or MobileSAM with its published names (models/mobile_sam.py)
  seg_projection.safetensors  Γ (models/seg_projection.py)
  similarity.safetensors      visual_normal [P,D], optional visual_abnormal [P',D], semantic_normal [1,H]
  parity_images/              optional: real images to compare source and export on
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast

from pydantic import Field
from safetensors import safe_open

from vmad_edge.export.reading import Shapes, in_words, read_json, read_shapes, validated
from vmad_edge.runtime.bundle import (
    Answer,
    ClipInput,
    Conversation,
    Llama,
    Record,
    SamInput,
    Similarity,
    SpacePrefix,
    Weights,
)
from vmad_edge.runtime.errors import CheckpointError

if TYPE_CHECKING:  # torch takes seconds to import, and reading a config does not need it
    import torch
    from transformers import CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel, SamModel

    from vmad_edge.export.models.ltc import LtcProjector
    from vmad_edge.export.models.mobile_sam import MobileSamConfig
    from vmad_edge.export.models.seg_projection import SegProjection

Model = TypeVar("Model", bound="PreTrainedModel")
Module = TypeVar("Module", bound="torch.nn.Module")

PICKLES = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})
PROMPT_WIDTH = 256
"""SAM's prompt and image embeddings, in every SAM."""
SAM_PATCH = 16


class LtcConfig(Record):
    scale_factor: Annotated[int, Field(gt=0)] = 2
    heads: Annotated[int, Field(gt=0)] = 8


class Config(Record):
    """`config.json`. Defaults are this project's assumptions where VMAD publishes nothing. [ASSUME]"""

    model_type: Literal["vmad"]
    weights: Weights
    image_aspect_ratio: Literal["pad"] | None = None
    """LLaVA's: "pad" pads to a square with the mean colour before CLIP's preprocessing."""
    patches_level: int = -2
    levels: Annotated[tuple[int, ...], Field(min_length=1)] = (-1, -2, -3, -4)
    """hidden_states that LTC takes; VMAD's figure names layer-1 (last) to layer-4 (fourth from last)."""
    ltc: LtcConfig = LtcConfig()
    conversation: Conversation
    seg_token: str = "<seg>"
    seg_state: Literal["emitting", "token"] = "emitting"
    yes_token_ids: tuple[int, ...]
    no_token_ids: tuple[int, ...]
    max_new_tokens: Annotated[int, Field(gt=0)] = 64
    answer: Answer = "full"
    max_prompt_tokens: Annotated[int, Field(gt=0)] = 512
    """Of template and question together; room is made for so many, not for all that the model was trained on."""
    llama: Llama = Llama()
    similarity: Similarity = Similarity()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose parts were all found, and fit each other. `Checkpoint.open` is the only way to one."""

    path: Path
    config: Config
    clip: ClipInput
    sam: SamInput
    grid: int
    """CLIP's patches per side."""
    width: int
    """D."""
    language_width: int
    """H."""
    vocabulary: int
    """Rows of the embedding, with what the adapter adds."""
    context_length: int
    space_prefix: SpacePrefix
    seg_token_id: int

    @staticmethod
    def open(path: Path | str) -> Checkpoint:
        """Read every config and the headers of the weights; of the weights themselves only the LLM's embedding.

        Raises:
            CheckpointError: a missing part, a wrong shape, an unknown setting, or a pickle.
        """
        folder = Path(path)
        if not os.path.isdir(folder):  # noqa: PTH112 (pathlib raises where a name is too long)
            raise CheckpointError(f"{folder}: expected the folder of a checkpoint, found none")
        try:
            str(folder.absolute()).encode()
        except UnicodeEncodeError:  # safetensors takes UTF-8 alone
            raise CheckpointError(f"{folder}: expected a path in UTF-8, found other bytes; rename the folder") from None
        _refuse_pickles(folder)
        _refuse_lfs_pointers(folder)
        config = validated(Config, folder / "config.json", read_json(folder / "config.json"))
        vision = _check_model(folder / "vision")
        language, vocabulary, space_prefix = _check_language(folder)
        segmenter = _check_segmenter(folder / "segmenter")
        width, language_width, grid = vision.hidden_size, language.hidden_size, vision.image_size // vision.patch_size
        _check_levels(folder / "config.json", config, vision.num_hidden_layers)
        _check_ltc(folder, config, grid, width, language_width)
        _check_seg_projection(folder / "seg_projection.safetensors", language_width)
        _check_similarity(folder / "similarity.safetensors", width, language_width)
        return Checkpoint(
            path=folder,
            config=config,
            clip=_clip_input(folder / "vision" / "preprocessor_config.json", config, vision.image_size),
            sam=_sam_input(folder / "segmenter", segmenter),
            grid=grid,
            width=width,
            language_width=language_width,
            vocabulary=vocabulary,
            context_length=language.max_position_embeddings,
            space_prefix=space_prefix,
            seg_token_id=_check_tokens(folder, config, vocabulary),
        )

    @property
    def visual_tokens(self) -> int:
        """K."""
        return (self.grid // self.config.ltc.scale_factor) ** 2

    def check_weights(self) -> None:
        """Read all weights once, one tensor at a time.

        Raises:
            CheckpointError: a tensor holds NaN or infinity.
        """
        import torch

        for path in sorted(self.path.rglob("*.safetensors")):
            for name in read_shapes(path):
                with safe_open(path, "pt") as file:  # one left open would keep all that was read mapped
                    finite = bool(torch.isfinite(file.get_tensor(name)).all())
                found = "NaN or infinity: the training overflowed. Export an earlier checkpoint of it"
                _expect(path, name, "finite numbers", found, ok=finite)

    def vision(self) -> CLIPVisionModel:
        from transformers import CLIPVisionModel

        return _load(CLIPVisionModel, self.path / "vision")

    def projector(self) -> LtcProjector:
        from vmad_edge.export.models.ltc import LtcProjector

        ltc = self.config.ltc
        module = LtcProjector(self.width, len(self.config.levels), self.language_width, ltc.scale_factor, ltc.heads)
        return _load_into(module, self.path / "projector.safetensors")

    def segmenter(self) -> SamModel:
        from transformers import SamModel

        from vmad_edge.export.models.mobile_sam import load_mobile_sam

        folder = self.path / "segmenter"
        mobile = _mobile_sam_config(folder)
        return load_mobile_sam(mobile, folder / "model.safetensors") if mobile else _load(SamModel, folder)

    def seg_projection(self) -> SegProjection:
        from vmad_edge.export.models.seg_projection import SegProjection

        module = SegProjection(self.language_width, PROMPT_WIDTH)
        return _load_into(module, self.path / "seg_projection.safetensors")

    @property
    def adapter(self) -> Path | None:
        """The LoRA's folder; None where `language/` is merged already."""
        folder = self.path / "adapter"
        return folder if folder.exists() else None

    def language(self) -> LlamaForCausalLM:
        """The language model with its LoRA, if there is one, merged by peft, in FP32."""
        from peft import PeftModel
        from transformers import LlamaForCausalLM

        base = _load(LlamaForCausalLM, self.path / "language")
        if base.config.vocab_size != self.vocabulary:
            base.resize_token_embeddings(self.vocabulary, mean_resizing=False)
        if self.adapter is None:
            return base
        merged: LlamaForCausalLM = PeftModel.from_pretrained(base, str(self.adapter)).merge_and_unload()
        return merged

    def streamed_language(self) -> LlamaForCausalLM:
        """The language model in FP32 with peft's LoRA beside its weights: what the exported one is measured against.

        In memory are the adapter and the one layer that runs: each reads its weights when it is called, and forgets
        them.
        """
        import torch
        from peft import PeftModel
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig.from_pretrained(self.path / "language")
        with torch.device("meta"):
            base = LlamaForCausalLM(config)
            if config.vocab_size != self.vocabulary:
                base.resize_token_embeddings(self.vocabulary, mean_resizing=False)
        base.model.rotary_emb = type(base.model.rotary_emb)(config)  # computed, not read
        modules = _empty(base)
        adapted: torch.nn.Module = base
        if self.adapter is not None:  # it changes `base` in place
            adapted = PeftModel.from_pretrained(base, str(self.adapter), low_cpu_mem_usage=True)
        adapted.float().eval()
        _read_when_called(modules, self.path / "language")
        return base


def _refuse_pickles(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in PICKLES:
            raise CheckpointError(
                f"{path} is a pickle: to load one is to run whatever program is inside it, so none is ever opened. "
                "Convert its weights to safetensors where you trust the file, and delete it from the checkpoint."
            )


def _refuse_lfs_pointers(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        refuse_lfs_pointer(path)


def refuse_lfs_pointer(path: Path) -> None:
    """What stands in a clone for a file that was not downloaded.

    Raises:
        CheckpointError: `path` is one.
    """
    # At most 1,024 bytes: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
    if path.is_file() and path.stat().st_size <= 1024 and _read(path).startswith(_LFS):
        raise CheckpointError(
            f"{path} is a git-LFS pointer, which stands for a file that was not downloaded: run `git lfs pull` in "
            "the clone that it comes from, and copy the file again."
        )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


_LFS = b"version https://git-lfs.github.com/spec/"


def _expect(path: Path, what: str, expected: str, found: object, *, ok: bool) -> None:
    if not ok:
        raise CheckpointError(f"{path}: {what}: expected {expected}, found {found!r}")


def _check_model(folder: Path) -> PretrainedConfig:
    """The config in `folder`, once the weights beside it are known to be that model's, all of them."""
    import torch
    import transformers as hf

    kinds: dict[str, tuple[str, Any, Any]] = {
        "vision": ("clip_vision_model", hf.CLIPVisionConfig, hf.CLIPVisionModel),
        "segmenter": ("sam", hf.SamConfig, hf.SamModel),
    }
    model_type, config_class, model_class = kinds[folder.name]
    path = folder / "config.json"
    data = read_json(path)
    found_type = data.get("model_type")
    wanted = ('"mobile_sam" or ' if folder.name == "segmenter" else "") + f'"{model_type}"'
    _expect(path, "model_type", wanted, found_type, ok=found_type == model_type)
    # transformers 4 wrote a prefix that version 5 dropped.
    found = {name.removeprefix("vision_model."): shape for name, shape in read_shapes(folder).items()}
    _refuse_depths(path, data, len(found))
    try:
        config: PretrainedConfig = config_class.from_dict(data)
        with torch.device("meta"):
            model = model_class(config)
    except Exception as error:  # transformers raises many kinds on a config that makes no model
        raise CheckpointError(
            f"{path}: expected a config of {model_class.__name__}, found: {in_words(error)}"
        ) from None
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    _check_shapes(folder, expected, found, optional=model.all_tied_weights_keys)
    return config


_REPEATED = frozenset({"iou_head_depth", "num_hidden_layers", "num_multimask_outputs", "num_point_embeddings"})
"""Settings that say how often a part of the model is built."""


def _refuse_depths(path: Path, data: Mapping[str, Any], most: int) -> None:
    """No part is there more often than there are tensors: a damaged number must not build modules without end."""
    for name, value in data.items():
        if isinstance(value, dict):
            _refuse_depths(path, value, most)
        elif name in _REPEATED and isinstance(value, int | float):
            _expect(path, name, f"at most {most}, as many as there are tensors", value, ok=value <= most)


def _check_segmenter(folder: Path) -> PretrainedConfig:
    """SAM's config, MobileSAM's in its form."""
    import torch

    from vmad_edge.export.models.mobile_sam import CLASSIFIER, mobile_sam, upstream_name

    mobile = _mobile_sam_config(folder)
    if mobile is None:
        return _check_model(folder)
    with torch.device("meta"):
        sam = mobile_sam(mobile)
    expected = {upstream_name(name): tuple(tensor.shape) for name, tensor in sam.state_dict().items()}
    found = {name: shape for name, shape in read_shapes(folder).items() if not CLASSIFIER.match(name)}
    _check_shapes(folder, expected, found, reason="MobileSAM's")
    return sam.config


def _mobile_sam_config(folder: Path) -> MobileSamConfig | None:
    """None for another segmenter."""
    from vmad_edge.export.models.mobile_sam import MobileSamConfig

    path = folder / "config.json"
    data = read_json(path)
    return validated(MobileSamConfig, path, data) if data.get("model_type") == "mobile_sam" else None


def _check_module(path: Path, module: torch.nn.Module, reason: str) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    _check_shapes(path, expected, read_shapes(path), reason=reason)


_NOT_WEIGHTS = re.compile(r"(position_ids|rotary_emb\.inv_freq)$")
"""Constants that older versions of transformers saved."""


def _check_shapes(
    path: Path, expected: Shapes, found: Shapes, *, optional: Mapping[str, str] | None = None, reason: str = ""
) -> None:
    because = f" ({reason})" if reason else " (from its config.json)"
    for name, shape in expected.items():
        if name not in found and name not in (optional or {}):
            raise CheckpointError(f"{path}: expected tensor {name} {list(shape)}{because}, found none of that name")
        if found.get(name, shape) != shape:
            raise CheckpointError(f"{path}: {name}: expected shape {list(shape)}{because}, found {list(found[name])}")
    if more := sorted(name for name in found.keys() - expected.keys() if not _NOT_WEIGHTS.search(name)):
        raise CheckpointError(
            f"{path}: expected {len(expected)} tensors{because}, found {len(more)} more, the first {more[0]}: "
            "these weights are another model's"
        )


def _check_levels(path: Path, config: Config, layers: int) -> None:
    for level in (config.patches_level, *config.levels):
        _expect(
            path,
            "patches_level and levels",
            f"indices of hidden_states, {-layers - 1} to {layers} (0 = embeddings)",
            level,
            ok=-layers - 1 <= level <= layers,
        )


def _check_ltc(folder: Path, config: Config, grid: int, width: int, language_width: int) -> None:
    import torch

    from vmad_edge.export.models.ltc import LtcProjector

    ltc, levels = config.ltc, len(config.levels)
    path = folder / "config.json"
    _expect(
        path, "ltc.scale_factor", f"a divisor of CLIP's grid {grid}", ltc.scale_factor, ok=grid % ltc.scale_factor == 0
    )
    _expect(path, "ltc.heads", f"a divisor of CLIP's width {width}", ltc.heads, ok=width % ltc.heads == 0)
    with torch.device("meta"):
        projector = LtcProjector(width, levels, language_width, ltc.scale_factor, ltc.heads)
    reason = f"CLIP's width {width}, {levels} levels, the LLM's width {language_width}"
    _check_module(folder / "projector.safetensors", projector, reason)


def _check_seg_projection(path: Path, language_width: int) -> None:
    import torch

    from vmad_edge.export.models.seg_projection import SegProjection

    with torch.device("meta"):
        projection = SegProjection(language_width, PROMPT_WIDTH)
    _check_module(path, projection, f"the LLM's width {language_width}, SAM's prompt width {PROMPT_WIDTH}")


def _check_similarity(path: Path, width: int, language_width: int) -> None:
    found = read_shapes(path)
    rows = {name: shape[0] for name, shape in found.items() if len(shape) == 2}
    expected: Shapes = {
        "visual_normal": (rows.get("visual_normal") or 1, width),
        "visual_abnormal": (rows.get("visual_abnormal") or 1, width),
        "semantic_normal": (1, language_width),
    }
    reason = f"CLIP's width {width}, the LLM's width {language_width}"
    _check_shapes(path, expected, found, optional={"visual_abnormal": ""}, reason=reason)


def _check_language(folder: Path) -> tuple[LlamaConfig, int, SpacePrefix]:
    """The LLM's config, the rows of its embedding with those that the adapter adds, and where its tokenizer puts ▁."""
    from transformers import LlamaConfig

    from vmad_edge.export.language import merged_tensors, read_vocabulary

    # All is checked before the first tensor, the embedding, is read; it alone is.
    _, embedding = next(merged_tensors(folder / "language", folder / "adapter"))
    space_prefix = read_vocabulary(folder / "language").space_prefix
    return LlamaConfig.from_pretrained(folder / "language"), len(embedding), space_prefix


def _check_tokens(folder: Path, config: Config, vocabulary: int) -> int:
    """The id of the seg token."""
    from vmad_edge.export.language import read_tokenizer

    tokenizer = read_tokenizer(folder / "language")
    path = folder / "config.json"
    ids = tokenizer.encode(config.seg_token, add_special_tokens=False)
    known = len(ids) == 1 and tokenizer.convert_ids_to_tokens(ids[0]) == config.seg_token
    _expect(path, "seg_token", "one token of language/'s tokenizer", config.seg_token, ok=known)
    for name in ("yes_token_ids", "no_token_ids"):
        found = getattr(config, name)
        ok = len(found) > 0 and all(0 <= id < vocabulary for id in found)
        _expect(path, name, f"ids from 0 to {vocabulary - 1}, the last of the vocabulary", found, ok=ok)
    both = set(config.yes_token_ids) & set(config.no_token_ids)
    _expect(path, "yes_token_ids and no_token_ids", "no id in both", sorted(both), ok=not both)
    seg: int = ids[0]
    _expect(path, "seg_token", f"an id below {vocabulary}, the rows of the embedding", seg, ok=seg < vocabulary)
    return seg


_RESAMPLE: dict[int, Literal["lanczos", "bilinear", "bicubic"]] = {1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers."""
_CLIP_PROCESSORS = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor")
_CLIP_SETTINGS = frozenset(
    {"crop_size", "do_center_crop", "do_convert_rgb", "do_normalize", "do_rescale", "do_resize", "resample", "size"}
    | {"feature_extractor_type", "image_mean", "image_processor_type", "image_std", "processor_class", "rescale_factor"}
    | {"default_to_square"}
    # How transformers passes arrays about; no pixel of a frame hangs on them.
    | {"_valid_processor_keys", "data_format", "device", "disable_grouping", "input_data_format", "return_tensors"}
)


def _clip_input(path: Path, config: Config, image_size: int) -> ClipInput:
    data = read_json(path)
    kind = data.get("image_processor_type", data.get("feature_extractor_type"))
    _expect(path, "image_processor_type", "CLIPImageProcessor", kind, ok=kind in _CLIP_PROCESSORS)
    for step in ("do_resize", "do_rescale", "do_normalize"):
        _expect(path, step, "true", data.get(step), ok=data.get(step, True) is True)
    for name in ("size", "resample", "do_center_crop", "image_mean", "image_std"):
        _expect(path, name, "a value", None, ok=name in data)
    for name in sorted(data.keys() - _CLIP_SETTINGS):
        _expect(
            path, name, "no such setting (this runtime would ignore it)", data[name], ok=data[name] in (None, False)
        )
    size, exact = _square(data["size"])
    exact |= isinstance(data["size"], int) and data.get("default_to_square") is True
    _expect(path, "size", f"{image_size}, vision/config.json's image_size", data["size"], ok=size == image_size)
    if data["do_center_crop"]:
        crop = data.get("crop_size")
        _expect(path, "crop_size", f"{image_size}, as size", crop, ok=_square(crop)[0] == image_size)
    else:
        whole = exact or config.image_aspect_ratio == "pad"
        _expect(
            path,
            "do_center_crop",
            'true, or a size of height and width, or config.json\'s image_aspect_ratio "pad"',
            False,
            ok=whole,
        )
    resample = data["resample"]
    _expect(path, "resample", f"one of {_RESAMPLE}", resample, ok=isinstance(resample, int) and resample in _RESAMPLE)
    settings = {
        "size": image_size,
        "resize": "exact" if exact else "shortest_edge",
        "pad_to_square": config.image_aspect_ratio == "pad",
        "resample": _RESAMPLE[data["resample"]],
        "rescale_factor": _rescale_factor(data),
        "mean": data["image_mean"],
        "std": data["image_std"],
    }
    return validated(ClipInput, path, settings)


def _rescale_factor(data: dict[str, Any]) -> Any:
    """null is transformers' way to say: the processor's own."""
    given = data.get("rescale_factor")
    return 1 / 255 if given is None else given


def _square(size: object) -> tuple[int | None, bool]:
    """Side in pixels, and whether both sides get it (else the shorter one); None for what is not square."""
    match size:
        case int(side) | {"shortest_edge": int(side)}:
            return side, False
        case {"height": int(height), "width": int(width)} if height == width:
            return height, True
    return None, False


def _sam_input(folder: Path, segmenter: PretrainedConfig) -> SamInput:
    vision, prompt, decoder = segmenter.vision_config, segmenter.prompt_encoder_config, segmenter.mask_decoder_config
    size, path = vision.image_size, folder / "config.json"
    for what, expected, found in (
        ("vision_config.patch_size", SAM_PATCH, vision.patch_size),
        ("vision_config.image_size", f"a multiple of {SAM_PATCH}", size),
        ("vision_config.output_channels", PROMPT_WIDTH, vision.output_channels),
        ("vision_config.num_pos_feats", PROMPT_WIDTH // 2, vision.num_pos_feats),
        ("prompt_encoder_config.image_size", size, prompt.image_size),
        ("prompt_encoder_config.patch_size", SAM_PATCH, prompt.patch_size),
        ("prompt_encoder_config.hidden_size", PROMPT_WIDTH, prompt.hidden_size),
        ("mask_decoder_config.hidden_size", PROMPT_WIDTH, decoder.hidden_size),
    ):
        ok = found % SAM_PATCH == 0 if isinstance(expected, str) else found == expected
        _expect(path, what, str(expected), found, ok=ok)
    path = folder / "preprocessor_config.json"
    if not path.exists():
        return SamInput(size=size)
    data = read_json(path)
    for what, value in (
        ("size", {"longest_edge": size}),
        ("resample", 2),
        ("do_normalize", True),
        ("do_rescale", True),
    ):
        _expect(path, what, str(value), data.get(what), ok=data.get(what) == value)
    scale, statistics = _rescale_factor(data), {"mean": data.get("image_mean"), "std": data.get("image_std")}
    _expect(path, "rescale_factor", "a number above 0", scale, ok=isinstance(scale, int | float) and scale > 0)
    given = validated(SamInput, path, {"size": size, **statistics})
    scaled = {name: tuple(value / scale for value in getattr(given, name)) for name in statistics}
    return SamInput.model_validate({"size": size, **scaled})


def _load(model_class: type[Model], folder: Path) -> Model:
    """The model in FP32. Tensors that are not there would silently be random: no model then.

    Raises:
        CheckpointError: transformers does not find all of the weights.
    """
    loaded: Any = model_class.from_pretrained(
        folder, dtype="float32", use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"{folder}: transformers finds no weights for {missing[0]} and {len(missing) - 1} more")
    model.eval()
    return cast("Model", model)


def _empty(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Put parameters that take no memory into all modules of `model`; returns those by name."""
    import torch

    modules = dict(model.named_modules())
    for module in modules.values():
        for name, parameter in module.named_parameters(recurse=False):
            # Not on the meta device: there peft would put its adapter too.
            setattr(module, name, torch.nn.Parameter(torch.zeros(1).expand(parameter.shape), requires_grad=False))
    return modules


def _read_when_called(modules: Mapping[str, torch.nn.Module], folder: Path) -> None:
    """Let the modules, by their names in `folder`, read those weights that are still empty as often as they run."""
    from vmad_edge.export.language import base_tensors

    readers = base_tensors(folder)
    for path, module in modules.items():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.untyped_storage().nbytes() < parameter.nbytes:  # else the adapter holds it
                _read_parameter_when_called(module, name, parameter, readers[f"{path}.{name}"])


def _read_parameter_when_called(
    module: torch.nn.Module, name: str, empty: torch.nn.Parameter, read: Callable[[], Any]
) -> None:
    import torch

    def fill(module: torch.nn.Module, inputs: Any) -> None:
        setattr(module, name, torch.nn.Parameter(torch.from_numpy(read()), requires_grad=False))

    def forget(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        setattr(module, name, empty)

    module.register_forward_pre_hook(fill)
    module.register_forward_hook(forget)


def _load_into(module: Module, path: Path) -> Module:
    from safetensors.torch import load_file

    module.load_state_dict(load_file(path))
    return module.float().eval()
