from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vmad_edge.runtime.dataset import Category, read_dataset
from vmad_edge.runtime.errors import FrameError

SIZE = (48, 64)


def draw(root: Path, names: Iterable[str]) -> None:
    """Frames; and masks where a name has an = with the row that is marked."""
    for name in names:
        path, _, row = name.partition("=")
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        mask = np.zeros(SIZE, np.uint8)
        if row:
            mask[int(row)] = 255
        Image.fromarray(mask if row else np.full((*SIZE, 3), 99, np.uint8)).save(root / path)


def seen(category: Category) -> dict[str, str | list[int]]:
    """Of each frame: "good", the rows that are marked, or "unmarked"."""
    found: dict[str, str | list[int]] = {}
    for frame in category.test:
        assert frame.path.is_file()
        mask = frame.read_mask(SIZE)
        found[frame.name] = (
            "unmarked" if mask is None else np.flatnonzero(mask.all(1)).tolist() if frame.defective else "good"
        )
    return found


def enrolled(category: Category, root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in category.train]


FOLDERS = {
    "MVTec AD, MPDD, WFDD": (
        [
            "train/good/000.png",
            "test/good/000.png",
            "test/cut/000.png",
            "test/cut/001.png",
            "ground_truth/cut/000_mask.png=3",
            "ground_truth/cut/001_mask.png=4",
        ],
        ["train/good/000.png"],
        {"test/good/000.png": "good", "test/cut/000.png": [3], "test/cut/001.png": [4]},
    ),
    "MVTec LOCO": (
        [
            "train/good/000.png",
            "validation/good/000.png",
            "test/good/000.png",
            "test/logical_anomalies/000.png",
            "test/structural_anomalies/000.png",
            *(f"ground_truth/logical_anomalies/000/{i:03}.png={i}" for i in range(3)),
            "ground_truth/structural_anomalies/000/000.png=9",
        ],
        ["train/good/000.png"],
        {
            "test/good/000.png": "good",
            "test/logical_anomalies/000.png": [0, 1, 2],
            "test/structural_anomalies/000.png": [9],
        },
    ),
    "BTAD": (
        [
            "train/ok/0.bmp",
            "test/ok/0.bmp",
            "test/ko/0.bmp",
            "test/ko/1.bmp",
            "test/ko/2.bmp",
            "ground_truth/ko/0.png=3",
            "ground_truth/ko/1.bmp=4",
        ],
        ["train/ok/0.bmp"],
        {"test/ok/0.bmp": "good", "test/ko/0.bmp": [3], "test/ko/1.bmp": [4], "test/ko/2.bmp": "unmarked"},
    ),
    "MVTec AD 2": (
        [
            "train/good/000_regular.png",
            "validation/good/000_regular.png",
            "test_public/good/000_regular.png",
            "test_public/bad/000_overexposed.png",
            "test_public/ground_truth/bad/000_overexposed_mask.png=7",
            "test_private/000_regular.png",
            "test_private_mixed/000_mixed.png",
        ],
        ["train/good/000_regular.png"],
        {"test_public/good/000_regular.png": "good", "test_public/bad/000_overexposed.png": [7]},
    ),
    "capitals and other endings": (
        [
            "train/Good/0.JPG",
            "test/GOOD/0.JPG",
            "test/Normal/0.jpeg",
            "test/ok/0.tif",
            "test/cut/0.JPG",
            "test/cut/1.webp",
            "test/cut/2.bmp",
            "test/cut/3.png",
            "test/cut/a.b.png",
            "ground_truth/cut/0.PNG=3",
            "ground_truth/cut/1_mask.TIFF=4",
            "ground_truth/cut/2.tif=5",
            "ground_truth/cut/3_mask.Bmp=6",
            "ground_truth/cut/a.b_mask.png=7",
        ],
        ["train/Good/0.JPG"],
        {
            **dict.fromkeys(("test/GOOD/0.JPG", "test/Normal/0.jpeg", "test/ok/0.tif"), "good"),
            **{
                "test/cut/" + name: [row]
                for row, name in enumerate(("0.JPG", "1.webp", "2.bmp", "3.png", "a.b.png"), 3)
            },
        },
    ),
    "folders in kinds": (
        [
            "test/good/a/0.png",
            "test/cut/a/0.png",
            "test/cut/b/0.png",
            "test/cut/b/1.png",
            "ground_truth/cut/a/0.png=3",
            "ground_truth/cut/b/0_mask.png=4",
            "ground_truth/cut/1.png=5",
        ],
        [],
        {"test/good/a/0.png": "good", "test/cut/a/0.png": [3], "test/cut/b/0.png": [4], "test/cut/b/1.png": "unmarked"},
    ),
    "normal and abnormal": (
        ["normal/0.png", "abnormal/0.png", "abnormal/cut/0.png", "ground_truth/abnormal/0.png=3"],
        [],
        {"normal/0.png": "good", "abnormal/0.png": [3], "abnormal/cut/0.png": "unmarked"},
    ),
    "OK and NG": (["OK/0.png", "NG/0.png"], [], {"OK/0.png": "good", "NG/0.png": "unmarked"}),
    "good and bad": (["good/0.png", "bad/0.png"], [], {"good/0.png": "good", "bad/0.png": "unmarked"}),
}


@pytest.mark.parametrize("names,train,test", FOLDERS.values(), ids=list(FOLDERS))
def test_folders(
    names: list[str],
    train: list[str],
    test: dict[str, str | list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("nut", "bolt_m3"):
        draw(tmp_path / "all" / name, names)
    bolt, nut = read_dataset(tmp_path / "all")
    assert (bolt.name, nut.name) == ("bolt_m3", "nut")
    assert enrolled(nut, tmp_path / "all/nut") == train and seen(nut) == test
    assert nut.left_out == ""
    assert [path.name for path in nut.unlabelled] == [Path(name).name for name in names if "private" in name]
    assert read_dataset(tmp_path / "all/nut") == [nut] == read_dataset(tmp_path / "all", ["nut"])
    monkeypatch.chdir(tmp_path / "all/nut")
    (here,) = read_dataset(Path())
    assert (here.name, seen(here)) == ("nut", test)


def test_what_is_no_test_frame_is_left_out_and_named(tmp_path: Path) -> None:
    test = {"test/good/0.png": "good", "test/cut/0.png": "unmarked"}
    draw(tmp_path / "nut", test)
    stray = ["overview.jpg", ".ipynb_checkpoints/a-checkpoint.png", "@eaDir/0.png", "cut/._0.png", ".trash/cut/1.png"]
    draw(tmp_path / "nut/test", stray)
    (tmp_path / "nut/test/cut/Thumbs.db").write_bytes(b"x")
    draw(tmp_path / "nut", ["train/defective/0.png"])
    (found,) = read_dataset(tmp_path)
    assert seen(found) == test and not found.train
    for name in ("overview.jpg", ".ipynb_checkpoints", "@eaDir", "Thumbs.db", "4 hidden"):
        assert name in found.left_out
    assert "1 in no kind's folder (overview.jpg)" in found.left_out
    draw(tmp_path / "nut2", ["good/0.png", "bad/0.png", "unsorted/0.png", ".git/0.png"])
    assert read_dataset(tmp_path / "nut2")[0].left_out == "1 neither normal nor defective by its name (unsorted)"


def test_links_are_followed(tmp_path: Path) -> None:
    draw(tmp_path / "store", ["cuts/0.png", "masks/0_mask.png=5", "whole/test/good/0.png", "single.png"])
    draw(tmp_path / "set/nut", ["test/good/0.png"])
    (tmp_path / "set/nut/ground_truth").mkdir()
    for link, target in (
        ("set/nut/test/cut", "store/cuts"),
        ("set/nut/ground_truth/cut", "store/masks"),
        ("set/bolt", "store/whole"),
        ("set/nut/test/good/1.png", "store/single.png"),
        ("set/nut/test/good/all", "set"),  # a circle
    ):
        (tmp_path / link).symlink_to(tmp_path / target)
    bolt, nut = read_dataset(tmp_path / "set")
    assert (bolt.name, seen(bolt)) == ("bolt", {"test/good/0.png": "good"})
    found = seen(nut)
    assert found.pop("test/cut/0.png") == [5] and found.pop("test/good/1.png") == "good"
    assert found["test/good/0.png"] == "good" and len(found) <= 3


@pytest.mark.parametrize(
    "break_it", [lambda path: path.symlink_to(f"/not/mounted/{path.name}"), lambda path: path.mkdir(mode=0)]
)
def test_a_kind_that_cannot_be_read_is_a_frame_that_cannot(break_it: Callable[[Path], None], tmp_path: Path) -> None:
    draw(tmp_path / "nut", ["test/good/0.png"])
    (tmp_path / "nut/test/scratch").mkdir()
    for name in ("cut", "scratch/1.png"):
        break_it(tmp_path / "nut/test" / name)
    if os.getuid() == 0 and (tmp_path / "nut/test/cut").is_dir():
        pytest.skip("root reads every folder")
    (found,) = read_dataset(tmp_path)
    assert {frame.name: frame.defective for frame in found.test} == {
        "test/good/0.png": False,
        "test/cut": True,
        "test/scratch/1.png": True,
    }


COLUMNS = ("object", "split", "label", "image", "mask")


def visa(folder: Path, rows: Iterable[Iterable[str]], delimiter: str = ",", encoding: str = "utf-8") -> None:
    (folder / "split_csv").mkdir(parents=True, exist_ok=True)
    with (folder / "split_csv/1cls.csv").open("w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=delimiter).writerows([COLUMNS, *rows])


@pytest.mark.parametrize(
    "delimiter,encoding", [(",", "utf-8"), (",", "utf-8-sig"), (";", "utf-8-sig"), ("\t", "utf-8")]
)
def test_visa(delimiter: str, encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    for name in ("pcb1", "candle"):
        for number, (split, label) in enumerate((("train", "normal"), ("test", "normal"), ("test", "anomaly"))):
            image = f"{name}/Data/Images/{label.title()}/{number}.JPG"
            mask = f"{name}/Data/Masks/Anomaly/{number}.png" if label == "anomaly" else ""
            draw(tmp_path, [image])
            if mask:
                (tmp_path / mask).parent.mkdir(parents=True)
                kinds = np.arange(SIZE[0], dtype=np.uint8)[:, None].repeat(SIZE[1], 1) % 5
                coloured = Image.fromarray(kinds).convert("P")
                coloured.putpalette([0] * 768)  # the numbers are in the file, whatever they look like
                coloured.save(tmp_path / mask)
            rows.append((name, split, label, image, mask))
    visa(tmp_path, rows, delimiter, encoding)
    candle, pcb1 = read_dataset(tmp_path)
    assert (candle.name, pcb1.name) == ("candle", "pcb1")
    assert enrolled(pcb1, tmp_path) == ["pcb1/Data/Images/Normal/0.JPG"]
    marked = [row for row in range(SIZE[0]) if row % 5]
    assert seen(pcb1) == {"pcb1/Data/Images/Normal/1.JPG": "good", "pcb1/Data/Images/Anomaly/2.JPG": marked}
    assert read_dataset(tmp_path / "pcb1") == [pcb1] == read_dataset(tmp_path, ["pcb1"])
    monkeypatch.chdir(tmp_path / "pcb1")
    assert [category.name for category in read_dataset(Path())] == ["pcb1"]


ROW = {"object": "a", "split": "test", "label": "normal", "image": "a.png", "mask": ""}


@pytest.mark.parametrize(
    "change,says",
    [
        ({"image": "../secret.png"}, "expected a path below"),
        ({"image": "/etc/secret.png"}, "expected a path below"),
        ({"image": "nothing.png"}, "line 2: nothing.png does not exist"),
        ({"image": ""}, "line 2: expected an image"),
        ({"label": "odd"}, "normal or anomaly"),
        ({"object": "../x"}, "expected an object's name"),
        ({"label": "anomaly", "mask": "nothing.png"}, "nothing.png does not exist"),
    ],
)
def test_visa_refuses(change: dict[str, str], says: str, tmp_path: Path) -> None:
    draw(tmp_path, ["a.png"])
    visa(tmp_path, [{**ROW, **change}.values()])
    with pytest.raises(FrameError, match=says):
        read_dataset(tmp_path)


@pytest.mark.parametrize(
    "text,says",
    [
        (b"object,split,label,image\na,test,normal,a.png\n", r"expected the columns .*\['mask'\] missing"),
        (b"object,split,label,image,mask\nb\xfcrste,test,normal,a.png,\n", "save it in UTF-8"),
        (b"", "expected the columns"),
    ],
)
def test_visa_refuses_tables(text: bytes, says: str, tmp_path: Path) -> None:
    visa(tmp_path, [])
    (tmp_path / "split_csv/1cls.csv").write_bytes(text)
    with pytest.raises(FrameError, match=says):
        read_dataset(tmp_path)


def real_iad(root: Path, images: str, tables: str = "realiad_jsons/realiad_jsons") -> None:
    """Two objects' tables, and the images of one of them: one camera's normal part, and a pit that two cameras saw."""
    views = {
        "ok": ("OK", "OK/S0001/toy_0001_OK_C1_20231021.jpg", None),
        "ng1": ("AK", "NG/AK/S0002/toy_0002_NG_AK_C1_20231021.jpg", "NG/AK/S0002/toy_0002_NG_AK_C1_20231021.png"),
        "ng2": ("AK", "NG/AK/S0002/toy_0002_NG_AK_C2_20231021.jpg", None),
        "new": ("OK", "OK/S0003/toy_0003_OK_C1_20231021.jpg", None),
    }
    rows = {
        name: {"category": "toy", "anomaly_class": kind, "image_path": image, "mask_path": mask}
        for name, (kind, image, mask) in views.items()
    }
    for name in ("toy", "usb"):
        table = {
            "meta": {"normal_class": "OK", "prefix": f"{name}/"},
            "train": [rows["ok"], rows["ng2"]],
            "test": [rows["new"], rows["ng1"], rows["ng2"]],
        }
        (root / tables).mkdir(parents=True, exist_ok=True)
        (root / tables / f"{name}.json").write_text(json.dumps(table), "utf-8")
    draw(root / images, [image for _, image, _ in views.values()])
    draw(root / images, [f"{mask}=4" for _, _, mask in views.values() if mask])


@pytest.mark.parametrize(
    "images,tables,given",
    [
        ("realiad_1024/toy", "realiad_jsons/realiad_jsons", "."),
        ("realiad_1024/toy", "realiad_jsons/realiad_jsons", "realiad_1024"),
        ("realiad_1024/toy", "realiad_jsons/realiad_jsons", "realiad_1024/toy"),
        ("realiad_1024/toy", "realiad_jsons/realiad_jsons_sv", "realiad_jsons/realiad_jsons_sv"),
        ("realiad_1024/toy", "realiad_jsons/realiad_jsons", "realiad_jsons"),
        ("realiad_raw/toy/toy", "realiad_jsons", "."),
        ("realiad_512/toy", "realiad_jsons_sv", "realiad_jsons_sv"),
        ("toy", "realiad_jsons", "."),
        ("toy", "realiad_jsons", "toy"),
    ],
)
def test_real_iad(images: str, tables: str, given: str, tmp_path: Path) -> None:
    real_iad(tmp_path, images, tables)
    (found,) = read_dataset(tmp_path / given)
    assert found.name == "toy"
    assert enrolled(found, tmp_path / images) == ["OK/S0001/toy_0001_OK_C1_20231021.jpg"]
    assert list(seen(found).values()) == ["good", [4], "unmarked"]
    assert found.test[1].name == "NG/AK/S0002/toy_0002_NG_AK_C1_20231021.jpg"


def test_real_iad_of_several_resolutions(tmp_path: Path) -> None:
    real_iad(tmp_path, "realiad_256/toy")
    real_iad(tmp_path, "realiad_1024/toy")
    with pytest.raises(FrameError, match=r"toy is in \S+realiad_1024 and in \S+realiad_256; name one of them"):
        read_dataset(tmp_path)
    (found,) = read_dataset(tmp_path / "realiad_256")
    assert all("realiad_256" in path.parts for path in (*found.train, *(frame.path for frame in found.test)))


@pytest.mark.parametrize(
    "text,says",
    [
        ("{", "expected Real-IAD's meta with prefix, train and test"),
        ('{"meta": {"prefix": "toy/"}, "train": [], "test": []}', "expected Real-IAD's"),
        ('{"meta": {"prefix": "toy/"}, "train": [], "test": [{"image_path": "a.png"}]}', "expected Real-IAD's"),
        ("[]", "expected Real-IAD's"),
    ],
)
def test_real_iad_refuses_tables(text: str, says: str, tmp_path: Path) -> None:
    real_iad(tmp_path, "toy", "realiad_jsons")
    (tmp_path / "realiad_jsons/toy.json").write_text(text)
    with pytest.raises(FrameError, match=says):
        read_dataset(tmp_path)


def test_what_lies_beside_real_iad_is_not_it(tmp_path: Path) -> None:
    real_iad(tmp_path, "realiad_1024/toy")
    draw(tmp_path / "ours", ["toy/ok/0.png", "toy/ng/0.png"])
    for given in ("ours", "ours/toy"):
        assert [seen(found) for found in read_dataset(tmp_path / given)] == [
            {"ok/0.png": "good", "ng/0.png": "unmarked"}
        ]


def test_real_iad_refuses_frames(tmp_path: Path) -> None:
    real_iad(tmp_path, "toy", "realiad_jsons")
    table = tmp_path / "realiad_jsons/toy.json"
    content = json.loads(table.read_text())
    table.write_text(json.dumps({**content, "meta": {"prefix": "../other"}}))
    with pytest.raises(FrameError, match="expected a path below"):
        read_dataset(tmp_path)
    content["test"][1]["image_path"] = "../secret.png"
    table.write_text(json.dumps(content))
    with pytest.raises(FrameError, match="expected a path below"):
        read_dataset(tmp_path)
    (tmp_path / "toy/OK/S0001/toy_0001_OK_C1_20231021.jpg").unlink()
    with pytest.raises(FrameError, match=r"toy_0001_OK_C1_20231021\.jpg does not exist"):
        read_dataset(tmp_path)


@pytest.mark.parametrize("names", [["a.png"], ["train/good/0.png"], ["good/0.png", "other/0.png"], ["bad/0.png"]])
def test_no_layout(names: list[str], tmp_path: Path) -> None:
    draw(tmp_path / "set", names)
    with pytest.raises(FrameError, match=r"expected MVTec AD's layout .* found none of them"):
        read_dataset(tmp_path / "set")
    with pytest.raises(FrameError, match="expected a data set's folder, found none"):
        read_dataset(tmp_path / "set" / names[0])


def test_a_category_behind_a_dead_link_is_an_error(tmp_path: Path) -> None:
    draw(tmp_path / "nut/test", ["good/0.png"])
    (tmp_path / "bolt").symlink_to("/not/mounted")
    with pytest.raises(FrameError, match="bolt leads nowhere"):
        read_dataset(tmp_path)
    assert [category.name for category in read_dataset(tmp_path, ["nut"])] == ["nut"]


def test_what_cannot_be_read_at_all_is_named(tmp_path: Path) -> None:
    with pytest.raises(FrameError, match=r"xxx: cannot be read \(File name too long\)"):
        read_dataset(tmp_path / ("x" * 300))


def test_no_frames_to_test(tmp_path: Path) -> None:
    draw(tmp_path / "nut/test", ["overview.png"])
    with pytest.raises(
        FrameError, match=r"nut has no frames to test; left out: 1 in no kind's folder \(overview\.png\)"
    ):
        read_dataset(tmp_path)
