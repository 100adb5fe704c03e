"""`vmad bench`: its arithmetic on planted times, and the command on the tiny bundle. No test measures time."""

from __future__ import annotations

import json
import math
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vmad_edge.runtime.benchmark import (
    WHOLE,
    Benchmark,
    Spread,
    Times,
    compare,
    drawn_frames,
    judge,
    read_benchmark,
    repeated,
    take_turns,
)
from vmad_edge.runtime.benchmark_page import picture
from vmad_edge.runtime.bundle import Bundle, Manifest, ScreenManifest, seal
from vmad_edge.runtime.cli import main
from vmad_edge.runtime.files import sha256
from vmad_edge.runtime.inspector import Inspector
from vmad_edge.runtime.machine import Clock, RunInProgress, busy_elsewhere, describe_machine, lacks_vnni
from vmad_edge.runtime.stages.language import LanguageModel


def test_percentiles_of_known_times() -> None:
    found = Spread.of([*range(101, 0, -1)])
    assert found == Spread(runs=101, p50=51, p95=96, p99=100, max=101, jitter=1)


def test_percentiles_are_those_of_the_standard_library() -> None:
    times = np.random.default_rng(0).lognormal(2, 1, 333).tolist()
    expected = statistics.quantiles(times, n=100, method="inclusive")
    found = Spread.of(times)
    assert [found.p50, found.p95, found.p99] == pytest.approx([expected[49], expected[94], expected[98]])
    assert found.jitter == pytest.approx(statistics.fmean(map(abs, map(float.__sub__, times[1:], times))))


@pytest.mark.parametrize(
    "runs,p95,p99",
    [(1, None, None), (19, None, None), (20, 1.0, None), (99, 1.0, None), (100, 1.0, 1.0)],
)
def test_a_percentile_needs_a_run_beyond_it(runs: int, p95: float | None, p99: float | None) -> None:
    found = Spread.of([1.0] * runs)
    assert (found.p50, found.p95, found.p99, found.jitter) == (1.0, p95, p99, 0.0)


def test_things_take_turns() -> None:
    done: list[tuple[str, object]] = []

    def thing(name: str) -> Any:
        return lambda frame: done.append((name, frame)) or {WHOLE: float(len(done))}

    frames = [np.full((1, 1), number, np.uint8) for number in range(4)]
    times = take_turns({name: thing(name) for name in "abc"}, frames, 60)
    turns = [done[start : start + 3] for start in range(0, len(done), 3)]
    assert all({name for name, _ in turn} == set("abc") for turn in turns)
    assert all(len({id(frame) for _, frame in turn}) == 1 for turn in turns)
    assert {turn[0][0] for turn in turns} == {turn[-1][0] for turn in turns} == set("abc")
    for name in "abc":
        assert len(times[name]) == 60
        assert {id(frame) for who, frame in done if who == name} == set(map(id, frames))


def run(clip: float, map: float) -> Times:
    return {WHOLE: clip + map, "clip_encoder": clip, "map": map}


@pytest.mark.parametrize(
    "runs,target,holds,late,blame",
    [
        ([run(8, 1)] * 100, 10, True, 0, "clip_encoder"),
        # the usual run is too long: its longest stage
        ([run(8, 3)] * 99 + [run(8, 50)], 10, False, 100, "clip_encoder"),
        # only some are: the stage that grew in them, not the longest one
        ([run(8, 1)] * 95 + [run(8.5, 5)] * 5, 10, False, 5, "map"),
        # one run in two hundred may be late
        ([run(8, 1)] * 199 + [run(20, 1)], 10, True, 1, "clip_encoder"),
        # none was late: the stage that grew in the longest
        ([run(8, 1)] * 99 + [run(8, 1.9)], 10, True, 0, "map"),
    ],
)
def test_which_stage_is_to_blame(runs: list[Times], target: float, holds: bool, late: int, blame: str) -> None:
    found = judge(runs, target)
    assert (found.holds, found.late, found.blame) == (holds, late, blame)


def bench(*args: object) -> int:
    return main(["bench", *map(str, args)])


@pytest.fixture(scope="module")
def measured(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bench.json and bench.png of everything, three times each."""
    out = tmp_path_factory.mktemp("bench")
    options = ["--device", "cpu", "--repeats", 3, "--banks", 5, 2, "--answer", "short", "--station", out / "station"]
    assert bench(tiny_bundle, *options, "--out", out) == 0
    return out


def after_the_image(manifest: Manifest, folder: Path) -> list[int]:
    with LanguageModel(folder / "llm.gguf", manifest.language, manifest.conversation) as model:
        return model.prompt_ids(manifest.conversation.question.replace("{object}", manifest.object))[1]


def test_what_is_measured(measured: Path, tiny_bundle: Path) -> None:
    found = json.loads((measured / "bench.json").read_text())
    assert found["settings"]["bundle"] == Bundle.open(tiny_bundle).hash and found["settings"]["answer"] == "short"
    assert set(found["screen"]["stages"]) == {
        *("read", "fitness", "preprocess", "clip_encoder", "similarity", "map", "verdict")
    }
    stages = {"ltc_projector", "sam_encoder", "prefill", "decode", "transfer"}
    assert stages <= set(found["review"]["stages"]) <= stages | {"mask_decoder"}
    review = found["review"]
    assert {"to P(yes)"} <= set(review["reached"]) <= {"to P(yes)", "to last word", "to mask"}
    assert review["stages"]["prefill"]["p50"] < review["reached"]["to P(yes)"]["max"]
    assert all(reached["max"] <= review["whole"]["max"] for reached in review["reached"].values())
    manifest = Bundle.open(tiny_bundle).for_review
    tokens = found["prefill"]["tokens"] - manifest.language.visual_tokens
    assert tokens == len(after_the_image(manifest, tiny_bundle))
    seconds = review["stages"]["prefill"]["p50"] / 1e3
    assert found["prefill"]["tokens_per_second"] == pytest.approx(found["prefill"]["tokens"] / seconds)
    assert [(bank["frames"], bank["patches"]) for bank in found["banks"]] == [(2, 2 * 16), (5, 5 * 16)]
    assert [batch["frames"] for batch in found["batches"]] == [1, 2, 4, 8]
    for spread in Benchmark.model_validate(found).spreads().values():
        assert spread.runs == 3 and 0 < spread.p50 <= spread.max and spread.p99 is spread.p95 is None
    assert found["screen"]["whole"]["p50"] == pytest.approx(statistics.median(found["screen"]["times_ms"]), abs=1e-3)
    parts = sum(stage["p50"] for stage in found["screen"]["stages"].values())
    assert parts == pytest.approx(found["screen"]["whole"]["p50"], rel=0.9)  # in the same unit, none counted twice
    assert found["target"] is None
    assert set(found["run"]) == {"command", "date", "machine", "versions", "others"}
    assert 0 <= found["run"]["others"] <= 1
    assert {"python", "vmad-edge", "onnxruntime", "llama-cpp-python"} <= set(found["run"]["versions"])
    assert found["run"]["machine"]["cores"] >= 1 and found["run"]["machine"]["power_mode"] is None
    assert not list(measured.glob("station/*/banks"))


def test_peak_memory(measured: Path) -> None:
    memory = read_benchmark(measured / "bench.json").memory
    assert memory.inspector and memory.with_banks and memory.review
    assert memory.with_banks >= memory.inspector > 30 < memory.review


def test_picture(measured: Path) -> None:
    with Image.open(measured / "bench.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape == (960, 1280, 3)
    for top in (0, 320, 640):  # histograms, waterfalls, growth
        assert (pixels[top : top + 320, :, 2] > pixels[top : top + 320, :, 0] + 50).any()  # blue


def test_ratios(measured: Path) -> None:
    now = read_benchmark(measured / "bench.json")
    slower = now.screen.whole.model_copy(update={"p50": now.screen.whole.p50 / 2, "p99": 1.0})
    before = now.model_copy(update={"screen": now.screen.model_copy(update={"whole": slower}), "review": None})
    found = compare(now, before)
    assert found.keys() == before.spreads().keys() < now.spreads().keys()
    assert found["screen"].p50 == pytest.approx(2) and found["screen"].p99 is None
    assert found["screen: map"].p50 == found["screen, 5 enrolled"].p50 == 1


@pytest.mark.parametrize("target,status", [(1e6, 0), (1e-3, 1)])
def test_target_and_comparison(
    target: float,
    status: int,
    tiny_bundle: Path,
    measured: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    frame = tmp_path / "frame.png"
    Image.fromarray(drawn_frames(1)[0][::16, ::16]).save(frame)
    options = ["--frames", frame, "--device", "cpu", "--no-review", "--banks", "--json", "--out", tmp_path]
    compared = ["--target-ms", target, "--against", measured / "bench.json"]
    assert bench(tiny_bundle, *options, *compared) == status
    found = json.loads(capsys.readouterr().out)
    assert found["target"]["holds"] is (status == 0) and found["target"]["late"] == 100 * status
    assert found["review"] is None and found["banks"] == [] and found["screen"]["whole"]["p99"] > 0
    now, before = (json.loads((folder / "bench.json").read_text()) for folder in (tmp_path, measured))
    ratio = now["screen"]["whole"]["p50"] / before["screen"]["whole"]["p50"]
    assert found["against"]["screen"] == {"p50": pytest.approx(ratio), "p99": None}


def test_a_bundle_that_screens_only_and_the_table(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "features"
    folder.mkdir()
    files = {path.name: sha256(path) for path in bundle.path.glob("clip_encoder.onnx*")}
    for name in files:
        (folder / name).write_bytes((bundle.path / name).read_bytes())
    fields = {name: getattr(bundle.manifest, name) for name in ("made_with", "weights", "clip", "vision", "similarity")}
    seal(folder, ScreenManifest(**fields, files=files))
    options = ["--device", "cpu", "--repeats", 2, "--banks", 1, "--station", tmp_path, "--out", tmp_path]
    assert bench(folder, *options) == 0
    shown = capsys.readouterr().out
    assert "clip_encoder" in shown and "screen, 1 enrolled" in shown and "prefill" not in shown
    found = read_benchmark(tmp_path / "bench.json")
    assert found.review is None and found.memory.review is None
    assert "no normal features" in found.settings.compared_with


def test_the_references_of_the_station_are_compared_with(tiny_bundle: Path, tmp_path: Path) -> None:
    with Inspector.open(tiny_bundle, tmp_path) as inspector:
        inspector.enroll(drawn_frames(3), object="nut")
    options = ["--object", "nut", "--device", "cpu", "--repeats", 1, "--banks", "--no-review", "--station", tmp_path]
    assert bench(tiny_bundle, *options, "--out", tmp_path) == 0
    assert read_benchmark(tmp_path / "bench.json").settings.compared_with == f"{3 * 16} enrolled patches of 'nut'"


def test_an_unknown_object_among_known_ones(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Inspector.open(tiny_bundle, tmp_path) as inspector:
        inspector.enroll(drawn_frames(1), object="nut")
    options = ["--object", "Nut", "--device", "cpu", "--repeats", 1, "--banks", "--no-review", "--station", tmp_path]
    assert bench(tiny_bundle, *options, "--out", tmp_path) == 2
    assert "Did you mean 'nut'?" in capsys.readouterr().err
    assert bench(tiny_bundle, *options, "--out", tmp_path, "--fallback", "bundle") == 0
    assert read_benchmark(tmp_path / "bench.json").settings.compared_with == "the bundle's normal features"


@pytest.mark.parametrize(
    "args,says",
    [
        (["--frames", "{tmp}/broken.png", "--no-review"], "broken.png cannot be measured with: .*not a readable"),
        # the same frame's review again would find its prompt done
        (["--frames", "{tmp}/broken.png"], "expected at least two frames, got one"),
        (["--target-ms", "5", "--repeats", "99"], "expected at least 100 repeats"),
        (["--repeats", "0"], "expected repeats"),
        (["--banks", "0"], "expected repeats and bank sizes"),
        (["--against", "{tmp}/nothing.json"], "nothing.json"),
        (["--against", "{tmp}/broken.png"], "expected a bench.json"),
    ],
)
def test_bad_input_is_one_line(
    args: list[str], says: str, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.png").write_text("no image")
    given = [arg.format(tmp=tmp_path) for arg in args]
    assert bench(tiny_bundle, *given, "--device", "cpu", "--station", tmp_path / "station") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(says, error)
    assert not (tmp_path / "station").exists()


def test_a_bank_is_repeated(tiny_bundle: Path, tmp_path: Path) -> None:
    with Inspector.open(tiny_bundle, tmp_path) as inspector:
        few = inspector.enroll(drawn_frames(3), keep=False)
    many = repeated(few, 5)
    assert [(frame.id, frame.start, frame.stop) for frame in many.frames] == [
        (few.frames[number % 3].id, 16 * number, 16 * (number + 1)) for number in range(5)
    ]
    assert (many.features[3 * 16 :] == few.features[: 2 * 16]).all() and (many.patch[:16] == few.patch[:16]).all()
    assert many.thresholds == few.thresholds


def test_drawn_frames_differ_and_come_again() -> None:
    frames = drawn_frames(2)
    assert frames[0].shape == (1024, 1280, 3) and frames[0].dtype == np.uint8
    assert (frames[0] != frames[1]).mean() > 0.5
    assert np.array_equal(frames, drawn_frames(2))


def test_a_jetson_tells_its_mode_and_clocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {
        "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
        "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd evtstrm\n",
        "proc/meminfo": "MemTotal:       64330752 kB\n",
        "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "2201600\n",
        "sys/devices/system/cpu/cpufreq/policy0/scaling_min_freq": "729600\n",
        "sys/devices/system/cpu/cpufreq/policy0/scaling_max_freq": "2201600\n",
        "sys/class/devfreq/17000000.gpu/cur_freq": "1300500000\n",
        "sys/class/devfreq/17000000.gpu/min_freq": "1300500000\n",
        "sys/class/devfreq/17000000.gpu/max_freq": "1300500000\n",
        "bin/nvpmodel": "#!/bin/sh\necho 'NV Power Mode: MAXN'; echo 0\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "bin/nvpmodel").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    machine = describe_machine(tmp_path)
    assert machine.processor == "NVIDIA Jetson AGX Orin Developer Kit, NEON" and machine.power_mode == "MAXN"
    assert machine.memory_gib == pytest.approx(61.4, abs=0.1)
    assert machine.clocks == {
        "policy0": Clock(now=2201.6, lowest=729.6, highest=2201.6),
        "17000000.gpu": Clock(now=1300.5, lowest=1300.5, highest=1300.5),
    }


@pytest.mark.parametrize(
    "machine,cpuinfo,lacks",
    [
        ("x86_64", "flags\t: fma avx2\n", True),  # Zen 3
        ("x86_64", "flags\t: fma avx2 avx_vnni\n", False),  # Alder Lake
        ("x86_64", "flags\t: avx2 avx512f avx512_vnni\n", False),
        ("AMD64", "", True),  # it does not tell
        ("aarch64", "Features\t: fp asimd\n", False),
    ],
)
def test_which_processors_lack_vnni(
    machine: str, cpuinfo: str, lacks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(cpuinfo)
    assert lacks_vnni(tmp_path) is lacks


def test_what_a_machine_does_not_tell_is_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    machine = describe_machine(tmp_path)
    assert machine.power_mode is machine.clocks is machine.memory_gib is None
    assert machine.processor
    assert RunInProgress(tmp_path).end().others is None


def test_what_other_processes_took(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    stat = tmp_path / "proc/stat"
    stat.write_text("cpu  100 0 100 5000 0 0 0 0 0 0\n")
    running = RunInProgress(tmp_path)
    stat.write_text("cpu  100 0 100 9000 90 0 0 0 0 0\n")  # idle and waiting for disks is not busy
    assert (quiet := running.end()).others == 0 and busy_elsewhere(quiet) is None
    stat.write_text("cpu  100 0 100 9000 90 0 0 9000000 0 0\n")
    assert (busy := running.end()).others == 1
    assert "upper bounds" in str(busy_elsewhere(busy))


def test_peak_memory_stays_when_it_is_freed() -> None:
    code = (
        "import os, numpy as np; from vmad_edge.runtime.machine import peak_mib\n"
        "before = peak_mib(os.getpid()); np.ones(64 << 17); print(peak_mib(os.getpid()) - before, peak_mib(None))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    grown, nobody = done.stdout.split()
    assert math.isclose(float(grown), 64, abs_tol=16) and nobody == "None"


def test_banks_on_a_gpu_have_no_similarity_of_their_own() -> None:
    """There it is a part of one graph: tables and picture do without."""
    measured = read_benchmark(Path(__file__).parents[2] / "benchmarks/results/bench.json")
    banks = tuple(bank.model_copy(update={"similarity": None}) for bank in measured.banks)
    found = measured.model_copy(update={"banks": banks})
    left_out = measured.spreads().keys() - found.spreads().keys()
    assert left_out == {f"screen, {bank.frames} enrolled: similarity" for bank in banks}
    assert picture(found).size == picture(measured).size and picture(found) != picture(measured)
