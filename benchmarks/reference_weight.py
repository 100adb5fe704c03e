"""At which weight references and the bundle's features find made-up defects best, on enrolled frames alone.

    python benchmarks/reference_weight.py demo/bundle ../shared/data/cookies:25 ../shared/data/magnetic_tile:1

What the reference model's `reference_weight` was set by: image AUROC, the mean of four folds. A quarter of the enrolled
frames is held out, and inspected as it is and with as many defects, one at a time, as stand behind the colon
(`patchcore_choice.with_defect`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from patchcore_choice import Picture, with_defect
from record import save
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.metrics import roc_auc_score

from vmad_edge.kernels import ReferenceBank, max_cosine
from vmad_edge.runtime.bundle import Bundle
from vmad_edge.runtime.folders import list_images
from vmad_edge.runtime.frame import Frame
from vmad_edge.runtime.machine import RunInProgress
from vmad_edge.runtime.stages.similarity import NormalFeatures, image_score
from vmad_edge.runtime.systems.vmad import Screen
from vmad_edge.runtime.timing import Stopwatch

WEIGHTS = (0.5, 0.7, 0.85, 0.9, 0.95, 0.97, 0.99, 1.0)
FOLDS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("datasets", nargs="+", metavar="CATEGORY:DEFECTS")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    run, bundle = RunInProgress(), Bundle.open(args.bundle)
    screen, spec, path = Screen(bundle, "cpu"), bundle.manifest.similarity, bundle.file("similarity.safetensors")
    sources = [NormalFeatures(path, spec.model_copy(update={"reference_weight": weight})) for weight in WEIGHTS]

    def patches(pictures: list[Picture], note: str) -> list[NDArray[np.float32]]:
        frames = [Frame(picture, str(place)) for place, picture in enumerate(pictures)]
        return [
            screen.run(frame, sources[0], Stopwatch()).features.patches for frame in track(frames, note, transient=True)
        ]

    reached = {}
    for dataset, defects in (argument.rsplit(":", 1) for argument in args.datasets):
        rng = np.random.default_rng(args.seed)
        enrolled = [Frame.read(path).pixels for path in list_images([str(Path(dataset) / "train/good")])]
        folds = []
        for fold in range(FOLDS):
            good = enrolled[fold::FOLDS]
            bank = [picture for place, picture in enumerate(enrolled) if place % FOLDS != fold]
            bad = [
                with_defect(picture, bank[rng.integers(len(bank))], rng)[0]
                for picture in good
                for _ in range(int(defects))
            ]
            note = f"{Path(dataset).name}, {fold + 1} of {FOLDS}"
            references = ReferenceBank.from_array(np.concatenate(patches(bank, note)))
            seen = [(query, 1 - max_cosine(query, references)[0]) for query in patches(good + bad, note)]
            scores = [[image_score(source.fused(*one), spec) for one in seen] for source in sources]
            folds.append([roc_auc_score([0] * len(good) + [1] * len(bad), found) for found in scores])
        reached[Path(dataset).name] = [float(auroc) for auroc in np.mean(folds, 0)]
    table = Table("weight of the references", *map(str, WEIGHTS))
    for name, aurocs in (reached | {"mean": np.mean(list(reached.values()), 0).tolist()}).items():
        table.add_row(name, *(f"{auroc:.3f}" for auroc in aurocs))
    Console().print(table)
    save("reference_weight", run.end(["scikit-learn"]), {"weights": WEIGHTS, "image_auroc": reached})


if __name__ == "__main__":
    main()
