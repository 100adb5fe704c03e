"""Source against export, stage by stage, on real images.

Each side goes its own way from the frame to the mask: transformers and the checkpoint's torch modules on one, the
bundle's files through the runtime's stages on the other. Both are asked the manifest's question and given its short
answer, so that every position of prompt and answer can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import ConfigDict
from rich.table import Table
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessorPil, SamImageProcessorPil

from vmad_edge.export.checkpoint import Checkpoint
from vmad_edge.runtime.bundle import Manifest, Record
from vmad_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.stages.language import LanguageModel
from vmad_edge.runtime.stages.preprocess import clip_pixels, sam_pixels

Array = NDArray[Any]
States = TypeVar("States", Array, Tensor)
Stages = dict[str, Array]
"""One frame's arrays by the name of their stage, in the order in which they come about."""


class StageParity(Record):
    """The worst over all images."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    stage: str
    cosine: float
    """Of the two flattened arrays."""
    max_relative_error: float
    """max |source − export| / max |source|; infinite where the shapes differ."""
    exact: bool
    """Equal to the last bit."""
    iou: float | None = None
    """Of the masks (logit > 0); only for masks."""


class Parity(Record):
    """`parity.json`."""

    images: tuple[str, ...]
    question: str
    stages: tuple[StageParity, ...]

    def table(self) -> Table:
        table = Table(title=f"source against export, worst of {len(self.images)} images", title_justify="left")
        table.add_column("stage")
        for column in ("cosine", "max rel. error", "exact", "mask IoU"):
            table.add_column(column, justify="right")
        for row in self.stages:
            iou = "" if row.iou is None else f"{row.iou:.4f}"
            exact = "yes" if row.exact else ""
            table.add_row(row.stage, f"{row.cosine:.7f}", f"{row.max_relative_error:.1e}", exact, iou)
        return table


def measure(
    checkpoint: Checkpoint,
    folder: Path,
    manifest: Manifest,
    images: Sequence[str],
    progress: Callable[[str], None] = lambda step: None,
) -> Parity:
    """Run `checkpoint` and the exported files in `folder` on `images`, side by side.

    Raises:
        FrameError: an image that cannot be read.
        BundleError: an exported file that its engine refuses.
    """
    question = manifest.conversation.question.replace("{object}", manifest.conversation.object)
    found: dict[str, list[StageParity]] = {}
    source = Source(checkpoint)
    with Exported(folder, manifest) as exported:
        for number, path in enumerate(images, 1):
            progress(f"parity: image {number} of {len(images)}")
            frame = Frame.read(path)
            ours = exported.run(frame, question, source.short_answer_ids)
            for stage, array in source.run(frame, question).items():
                found.setdefault(stage, []).append(compare(stage, array, ours[stage]))
    names = tuple(Path(path).name for path in images)
    return Parity(images=names, question=question, stages=tuple(_worst(rows) for rows in found.values()))


def compare(stage: str, source: Array, exported: Array) -> StageParity:
    """One stage on one image. NaN stays NaN."""
    if source.shape != exported.shape:
        return StageParity(stage=stage, cosine=0.0, max_relative_error=float("inf"), exact=False)
    a, b = source.astype(np.float64).ravel(), exported.astype(np.float64).ravel()
    iou = None
    if stage == "low_res_masks":
        union = ((a > 0) | (b > 0)).sum()
        iou = float(((a > 0) & (b > 0)).sum() / union) if union else 1.0
    if np.array_equal(source, exported):  # all zeros too, which have no cosine
        return StageParity(stage=stage, cosine=1.0, max_relative_error=0.0, exact=True, iou=iou)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = float(a @ b / np.sqrt((a @ a) * (b @ b)))
        error = float(np.abs(a - b).max() / np.abs(a).max())
    return StageParity(stage=stage, cosine=cosine, max_relative_error=error, exact=False, iou=iou)


def _worst(rows: list[StageParity]) -> StageParity:
    ious = [row.iou for row in rows if row.iou is not None]
    return StageParity(
        stage=rows[0].stage,
        cosine=float(np.min([row.cosine for row in rows])),
        max_relative_error=float(np.max([row.max_relative_error for row in rows])),
        exact=all(row.exact for row in rows),
        iou=min(ious) if ious else None,
    )


class Source:
    """The checkpoint in torch, FP32, on the CPU."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._config = checkpoint.config
        self._seg_token_id = checkpoint.seg_token_id
        self._clip_processor = CLIPImageProcessorPil.from_pretrained(checkpoint.path / "vision")
        side = checkpoint.sam.size
        self._sam_processor = SamImageProcessorPil(
            size={"longest_edge": side},
            pad_size={"height": side, "width": side},
            image_mean=checkpoint.sam.mean,
            image_std=checkpoint.sam.std,
            do_rescale=False,
        )
        self._tokenizer = AutoTokenizer.from_pretrained(checkpoint.path / "language")
        self._vision = checkpoint.vision()
        self._projector = checkpoint.projector()
        self._language = checkpoint.language()
        self._sam = checkpoint.segmenter()
        self._seg_projection = checkpoint.seg_projection()

    @property
    def short_answer_ids(self) -> list[int]:
        """Of the short answer, `<seg>` included."""
        return [*self._ids(self._config.conversation.short_answer), self._seg_token_id]

    @torch.no_grad()
    def run(self, frame: Frame, question: str) -> Stages:
        stages: dict[str, Tensor] = {}
        image = Image.fromarray(frame.pixels)
        stages["clip_pixels"] = self._clip_processor(self._squared(image), return_tensors="pt").pixel_values
        stages["sam_pixels"] = self._sam_processor(image, return_tensors="pt").pixel_values.float()

        seen = self._vision(stages["clip_pixels"], output_hidden_states=True)
        stages["patches"] = seen.hidden_states[self._config.patches_level][:, 1:]
        stages["patches_multi"] = torch.stack([seen.hidden_states[i][:, 1:] for i in self._config.levels], 1)
        stages["cls"] = seen.pooler_output
        stages["visual_tokens"] = self._projector(stages["patches"], stages["patches_multi"])
        stages["image_embeddings"] = self._sam.get_image_embeddings(stages["sam_pixels"])

        before, after = (
            part.replace("{question}", question) for part in self._config.conversation.template.split("<image>")
        )
        first = self._tokenizer(before).input_ids
        last = self._ids(after)
        stages["prompt_ids"] = torch.tensor(first + last)
        answered = last + self.short_answer_ids
        embed = self._language.get_input_embeddings()
        prompt = [embed(torch.tensor([first])), stages["visual_tokens"], embed(torch.tensor([answered]))]
        answer = self._language(inputs_embeds=torch.cat(prompt, 1), output_hidden_states=True)
        stages["hidden_states"] = answer.hidden_states[-1][0]
        stages["logits"] = answer.logits[0]

        stages["h_seg"] = h_seg(stages["hidden_states"], self._config.seg_state)
        dense = self._sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        masks, _ = self._sam.mask_decoder(
            image_embeddings=stages["image_embeddings"],
            image_positional_embeddings=self._sam.get_image_wide_positional_embeddings(),  # type: ignore[no-untyped-call]
            sparse_prompt_embeddings=self._seg_projection(stages["h_seg"])[None, :, None],
            dense_prompt_embeddings=dense.expand_as(stages["image_embeddings"]),
            multimask_output=False,
        )
        stages["low_res_masks"] = masks[0]
        return {name: tensor.numpy() for name, tensor in stages.items()}

    def _ids(self, text: str) -> list[int]:
        """Of a text that does not begin the prompt: no BOS."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def _squared(self, image: Image.Image) -> Image.Image:
        """LLaVA's image_aspect_ratio "pad", which transformers' processor does not know."""
        if self._config.image_aspect_ratio != "pad":
            return image
        side = max(image.size)
        colour = tuple(int(value * 255) for value in self._clip_processor.image_mean)
        square = Image.new("RGB", (side, side), colour)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square


class Exported:
    """The bundle's files in ONNX Runtime and llama.cpp, on the CPU, through the runtime's stages."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._manifest = manifest
        self._engines = {
            name: OnnxRuntimeEngine(folder / f"{name}.onnx")
            for name in ("clip_encoder", "ltc_projector", "sam_encoder", "mask_decoder")
        }
        self._language = LanguageModel(folder / "llm.gguf", manifest.language, manifest.conversation, exact=True)

    def __enter__(self) -> Exported:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._language.close()

    def run(self, frame: Frame, question: str, answer_ids: Sequence[int]) -> Stages:
        stages: Stages = {}
        stages["clip_pixels"], _ = clip_pixels(frame, self._manifest.clip)
        stages["sam_pixels"], _ = sam_pixels(frame, self._manifest.sam)
        for engine, names in (
            ("clip_encoder", ("clip_pixels",)),
            ("ltc_projector", ("patches", "patches_multi")),
            ("sam_encoder", ("sam_pixels",)),
        ):
            stages |= self._engines[engine].run({name: stages[name] for name in names})
        before, after = self._language.prompt_ids(question)
        stages["prompt_ids"] = np.array(before + after)
        stages["hidden_states"], stages["logits"] = self._language.hidden_states(
            stages["visual_tokens"][0], question, answer_ids
        )
        stages["h_seg"] = h_seg(stages["hidden_states"], self._manifest.language.seg_state)
        stages |= self._engines["mask_decoder"].run({name: stages[name] for name in ("image_embeddings", "h_seg")})
        return stages


def h_seg(hidden_states: States, seg_state: Literal["emitting", "token"]) -> States:
    """[T,H], `<seg>` at the last position → [1,H]: the state of `<seg>`, or of the step before it, which emits it."""
    return hidden_states[-1:] if seg_state == "token" else hidden_states[-2:-1]
