"""VMAD's ablation at our size: LTC on/off × DSSL on/off, each row from the same seed on the same samples.

`python -m vmad_edge.export.reference.ablation --out DIR [--samples 20000]`: half of the samples go to stage "see", half
to "read"; there is no mask branch. Prints JSON, a row a variant, measured on parts of the trained families that none
of them saw. A row that is done is not trained again.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from vmad_edge.export.reference.evaluate import auroc, batches, unseen
from vmad_edge.export.reference.model import CLIP, ReferenceModel
from vmad_edge.export.reference.text import QUESTION, Reader, load_tokenizer
from vmad_edge.export.reference.train import arguments, train
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.metrics import measure, pixel_scores
from vmad_edge.runtime.stages.preprocess import clip_pixels
from vmad_edge.runtime.stages.similarity import anomaly_map, image_score


@torch.no_grad()
def figures(model: ReferenceModel, count: int) -> dict[str, float]:
    """Of the screen and of P(yes), on `count` unseen parts that are all called "part"."""
    before, after = model.reader.prompt(QUESTION.replace("{object}", "part"))
    embed, similarity = model.language.get_input_embeddings(), model.config.similarity
    defective, p_yes, score, maps = [], [], [], []
    for parts in batches(unseen(count, first=0)):
        seen = [clip_pixels(Frame(part.image, part.object), CLIP) for part in parts]
        patches, visual_tokens = model.see(torch.from_numpy(np.concatenate([pixels for pixels, _ in seen])))
        chunks = [embed(torch.tensor([ids])).expand(len(parts), -1, -1) for ids in (before, after)]
        states = model.language.model(inputs_embeds=torch.cat([chunks[0], visual_tokens, chunks[1]], 1))
        logits = model.language.lm_head(states.last_hidden_state[:, -1])[:, [model.reader.yes_id, model.reader.no_id]]
        p_yes += logits.softmax(-1)[:, 0].tolist()
        for part, (_, view), scores in zip(parts, seen, model.patch_logits(patches).sigmoid().numpy(), strict=True):
            defective.append(part.kind is not None)
            score.append(image_score(scores, similarity))
            maps.append(pixel_scores(anomaly_map(scores, view, similarity, CLIP.size, part.mask.shape), part.mask)[0])
    bad = np.array(defective)
    found = {
        "image AUROC of the screen": auroc(np.array(score), bad),
        "image AUROC of P(yes)": auroc(np.array(p_yes), bad),
        "pixel AUROC of the map": measure(maps).auroc or float("nan"),
    }
    return {name: round(value, 4) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=20_000, help="of a row")
    parser.add_argument("--parts", type=int, default=1000)
    args = parser.parse_args()
    rows = {}
    for ltc, dssl in product((False, True), repeat=2):
        name = " + ".join(part for part, on in (("LTC", ltc), ("DSSL", dssl)) if on) or "neither"
        out = args.out / name.replace(" ", "")
        half = str(args.samples // 2)
        command = ["--out", str(out), "--see-samples", half, "--read-samples", half]
        command += [word for stage in ("join", "segment", "mask") for word in (f"--{stage}-samples", "0")]
        command += [word for part, on in (("ltc", ltc), ("dssl", dssl)) if not on for word in ("--without", part)]
        train(arguments().parse_args(command))
        reader = Reader(load_tokenizer(out / "tokenizer"))
        model = ReferenceModel(reader, 0, ltc, dssl).eval()
        with safe_open(out / "read1.safetensors", "pt") as file:
            names = [key for key in file.keys() if key.startswith("model.")]  # noqa: SIM118
            model.load_state_dict({key.removeprefix("model."): file.get_tensor(key) for key in names})
        rows[name] = figures(model, args.parts)
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
