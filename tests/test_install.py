"""What is installed: locks that cover all that the runtime needs, and a wheel of llama.cpp that nobody else made."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
NOT_LOCKED = {"export", "test", "tensorrt"}  # tests/constraints.txt; tensorrt's package fetches its library unhashed


def entries(name: str) -> list[tuple[Requirement, list[str]]]:
    """The requirements of install/NAME.lock and of what it includes, with their hashes."""
    text = (ROOT / "install" / f"{name}.lock").read_text().replace("\\\n", "")
    found = []
    for line in text.splitlines():
        if line.startswith("-r "):
            found += entries(line.removeprefix("-r ").removesuffix(".lock"))
        else:
            requirement, *hashes = re.split(r"\s+--hash=", line)
            found.append((Requirement(requirement), hashes))
    return found


def pinned(locks: list[str], python: str, machine: str) -> dict[str, str]:
    """Versions by name, as pip would take them there."""
    there = {**default_environment(), "python_version": python, "python_full_version": f"{python}.4"}
    there |= {"platform_machine": machine, "sys_platform": "linux", "platform_system": "Linux"}
    found: dict[str, str] = {}
    for lock in locks:
        for requirement, _ in entries(lock):
            if requirement.marker is None or requirement.marker.evaluate(there):
                version = str(requirement.specifier).removeprefix("==")
                assert found.setdefault(canonicalize_name(requirement.name), version) == version
    return found


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_each_lock_pins_all_that_its_extra_asks_for(python: str, machine: str) -> None:
    wanted = {extra: PROJECT["project"]["dependencies"] + asked for extra, asked in EXTRAS.items()}
    wanted["build"] = PROJECT["build-system"]["requires"]
    for name in wanted.keys() - NOT_LOCKED:
        locked = pinned([name, "llama"], python, machine)
        for asked in map(Requirement, wanted[name]):
            assert asked.specifier.contains(locked[canonicalize_name(asked.name)]), f"{asked} in {name}.lock"


def test_every_pin_has_hashes_and_stands_in_one_place() -> None:
    locks = [path.stem for path in (ROOT / "install").glob("*.lock")]
    assert locks
    for name in locks:
        for requirement, hashes in entries(name):
            assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)) and requirement.url is None
            assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in hashes)
    constrained = [line for line in (ROOT / "tests/constraints.txt").read_text().splitlines() if line[0] != "#"]
    names = {canonicalize_name(Requirement(line).name) for line in constrained}
    assert not names & pinned(locks, "3.12", "x86_64").keys()


def test_notice_names_every_source_that_the_code_names() -> None:
    found = set()
    for path in [path for wing in ("export", "runtime", "kernels", "benchmarks") for path in (ROOT / wing).rglob("*")]:
        if path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh"}:
            text = path.read_text()
            found |= set(re.findall(r"arXiv[: ]*(\d{4}\.\d{4,5})", text))
            found |= set(re.findall(r"[A-Z][\w-]+ et al", text))
            found |= set(re.findall(r"(?:github\.com/|after [^()]*\(|follows [^()]*\()([\w-]+/[\w-]+)", text))
    assert {"2409.20146", "Roth et al", "ggml-org/ggml", "CircleRadon/TokenPacker", "dvlab-research/LISA"} <= found
    notice = (ROOT / "NOTICE").read_text()
    assert [source for source in sorted(found) if source not in notice] == []


@pytest.fixture
def llama() -> Any:
    spec = importlib.util.spec_from_file_location("install_llama", ROOT / "install/llama.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def builds(content: bytes) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        (folder / "llama_cpp_python-0.3.36-py3-none-any.whl").write_bytes(content)

    return build


def never(folder: Path) -> None:
    raise AssertionError("built again")


def test_wheel_is_built_once_a_recipe_where_nobody_else_may_write(llama: Any, tmp_path: Path) -> None:
    cache = tmp_path / "home/cache"
    mask = os.umask(0)  # files would be everybody's
    try:
        wheel = llama.cached(cache, {"flags": ""}, builds(b"wheel"))
    finally:
        os.umask(mask)
    assert [path.stat().st_mode & 0o777 for path in (cache, wheel.parent, wheel)] == [0o700, 0o700, 0o600]
    assert llama.cached(cache, {"flags": ""}, never) == wheel
    assert llama.cached(cache, {"flags": "-DX=1"}, builds(b"other")).read_bytes() == b"other"
    assert llama.cached(cache, {"flags": ""}, never).read_bytes() == b"wheel"


def to_a_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def to_another_owner(path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give a file away")
    os.chown(path, 12345, -1)


def to_other_bytes(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"e", b"E"))


CHANGES = {
    "another's": (to_another_owner, "belongs to user 12345"),
    "the group's": (lambda path: path.chmod(0o770), "others may write"),
    "everybody's": (lambda path: path.chmod(0o707), "others may write"),
    "a link": (to_a_link, "is a link"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("what", ["folder", "record", "wheel"])
def test_wheel_that_another_could_have_written_is_built_again(
    llama: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], what: str, change: str
) -> None:
    wheel = llama.cached(tmp_path / "cache", {}, builds(b"old"))
    act, reason = CHANGES[change]
    act({"folder": wheel.parent, "record": wheel.with_name("built.json"), "wheel": wheel}[what])
    refused_unless_built(llama, tmp_path / "cache", reason, capfd)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("*.whl", lambda path: path.write_bytes(b"o1d"), "its SHA-256 is another"),
        ("*.whl", Path.unlink, "No such file"),
        ("built.json", Path.unlink, "No such file"),
        ("built.json", lambda path: path.write_text("{"), "cannot be used"),
        ("built.json", lambda path: path.write_text("[]"), "cannot be used"),
        ("built.json", lambda path: path.write_text(path.read_text().replace("{}", '{"c": "gcc"}')), "another build"),
    ],
)
def test_wheel_that_is_not_what_was_recorded_is_built_again(
    llama: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, change: Any, reason: str
) -> None:
    folder = llama.cached(tmp_path / "cache", {}, builds(b"old")).parent
    change(next(folder.glob(name)))
    refused_unless_built(llama, tmp_path / "cache", reason, capfd)


def refused_unless_built(llama: Any, cache: Path, reason: str, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    assert llama.cached(cache, {}, builds(b"new")).read_bytes() == b"new"
    assert reason in capfd.readouterr().out
    assert llama.cached(cache, {}, never).read_bytes() == b"new"


@pytest.mark.parametrize("change", [name for name in CHANGES if name != "a link"])
def test_cache_that_others_may_write_to_is_refused(llama: Any, tmp_path: Path, change: str) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    act, reason = CHANGES[change]
    act(cache)
    with pytest.raises(SystemExit, match=reason):
        llama.cached(cache, {}, never)


def test_build_that_failed_or_was_killed_leaves_nothing(llama: Any, tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        (folder / "half.whl").touch()
        raise SystemExit(1)

    with pytest.raises(SystemExit):
        llama.cached(tmp_path, {}, fails)
    (tmp_path / "building-killed/new").mkdir(parents=True)
    wheel = llama.cached(tmp_path, {}, builds(b"whole"))
    assert {path.name for path in tmp_path.iterdir()} == {wheel.parent.name, "llama.busy"}


def test_second_build_waits_for_the_first(llama: Any, tmp_path: Path) -> None:
    """`flock` knows open files, not threads: two threads that each open it exclude each other as processes do."""
    building, go, found = threading.Event(), threading.Event(), []

    def slowly(folder: Path) -> None:
        building.set()
        assert go.wait(60)
        builds(b"first")(folder)

    first = threading.Thread(target=lambda: found.append(llama.cached(tmp_path, {}, slowly)))
    second = threading.Thread(target=lambda: found.append(llama.cached(tmp_path, {}, never)))
    first.start()
    assert building.wait(60)
    second.start()
    second.join(0.2)
    assert second.is_alive()
    go.set()
    first.join()
    second.join()
    assert [wheel.read_bytes() for wheel in found] == [b"first", b"first"]


def test_recipe_holds_source_flags_compilers_and_processor(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_NATIVE=OFF")
    plain = llama.recipe()
    assert plain["source"].startswith("==0.3.36 sha256:")
    assert plain["c++"].startswith(subprocess.check_output(["c++", "--version"], text=True).splitlines()[0])
    for name, value, changed in [
        ("CMAKE_ARGS", "-DGGML_NATIVE=OFF -DGGML_AVX2=ON", {"CMAKE_ARGS"}),
        ("CXXFLAGS", "-O1", {"CXXFLAGS"}),
        ("CC", "cc -mtune=native -DX=1", {"c"}),
        ("CMAKE_ARGS", "", {"CMAKE_ARGS", "c", "c++"}),  # compiled for this very processor
    ]:
        with monkeypatch.context() as there:
            there.setenv(name, value)
            other = llama.recipe()
        assert {key for key in plain if plain[key] != other[key]} == changed
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit, match="compiler"):
        llama.recipe()


def test_flags_of_the_environment_come_after_ours(llama: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipes: list[dict[str, str]] = []
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_CUDA=on")
    monkeypatch.setattr(sys, "argv", ["llama.py", str(tmp_path)])
    monkeypatch.setattr(llama, "cached", lambda cache, recipe, build: recipes.append(recipe))
    monkeypatch.setattr(llama, "pip", lambda *arguments: None)
    llama.main()
    assert recipes[0]["CMAKE_ARGS"] == os.environ["CMAKE_ARGS"] == f"{llama.OURS} -DGGML_CUDA=on"
    if platform.machine() == "x86_64":
        assert "-DGGML_NATIVE=OFF" in llama.OURS  # with it AMX code crashes
