"""Image AUROC of the screen on a folder in MVTec-AD layout: against the bundle's normal features, and enrolled.

python benchmarks/real_images.py demo/bundle ../shared/data/cookies ../shared/data/magnetic_tile
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from record import save
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.metrics import roc_auc_score

from vmad_edge.runtime.folders import list_images
from vmad_edge.runtime.inspector import Inspector
from vmad_edge.runtime.machine import RunInProgress, peak_mib


def auroc(inspector: Inspector, dataset: Path, note: str) -> tuple[float, int]:
    """Image AUROC over test/, and the number of frames."""
    paths = list_images([str(dataset / "test")])
    scores = [inspector.inspect(path, review=False).score for path in track(paths, note, transient=True)]
    return float(roc_auc_score([Path(path).parent.name != "good" for path in paths], scores)), len(paths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("datasets", type=Path, nargs="+")
    args = parser.parse_args()
    run = RunInProgress()
    measured = {}
    table = Table("data set", "enrolled", "tested", "AUROC, normal features", "AUROC, enrolled", "s to enroll")
    for dataset in args.datasets:
        with tempfile.TemporaryDirectory() as station, Inspector.open(args.bundle, station, "cpu") as inspector:
            before, count = auroc(inspector, dataset, f"{dataset.name}, normal features")
            good = list_images([str(dataset / "train/good")])
            start = time.perf_counter()
            inspector.enroll(track(good, f"{dataset.name}, enrolling", transient=True))
            seconds = time.perf_counter() - start
            after, _ = auroc(inspector, dataset, f"{dataset.name}, enrolled")
        measured[dataset.name] = {
            "enrolled": len(good),
            "tested": count,
            "image_auroc_normal_features": before,
            "image_auroc_enrolled": after,
            "seconds_to_enroll": seconds,
        }
        table.add_row(dataset.name, str(len(good)), str(count), f"{before:.3f}", f"{after:.3f}", f"{seconds:.1f}")
    Console().print(table)
    save("real_images", run.end(["scikit-learn"]), {"datasets": measured, "peak_mib": peak_mib(os.getpid())})


if __name__ == "__main__":
    main()
