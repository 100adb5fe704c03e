"""Installs llama.cpp into this environment from a wheel that was built on this machine: python install/llama.py CACHE

A wheel in CACHE is used only if it was built of the same source, with the same flags, by the same compilers, if it is
ours or root's and nobody else may write to it, and if it has the hash that was recorded when it was built. Otherwise it
is built again, which takes minutes. CMAKE_ARGS (after ours) and the other variables in FLAGS reach the build.
"""

import fcntl
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

LOCK = Path(__file__).with_name("llama.lock")
# GGML_NATIVE picks AMX code that crashes on Q8_0 (llama.cpp inside 0.3.36); elsewhere than x86 the build chooses.
X86 = "-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON "
OURS = X86 * (platform.machine() == "x86_64") + "-DLLAVA_BUILD=OFF"
FLAGS = ("CMAKE_ARGS", "CFLAGS", "CXXFLAGS", "LDFLAGS")
RECORD = "built.json"


def recipe() -> dict[str, str]:
    """All that the wheel depends on. No Python is among it: the wheel's tag is py3-none."""
    return {
        "source": " ".join(re.findall(r"==\S+|sha256:\w+", LOCK.read_text())),
        "platform": " ".join([sysconfig.get_platform(), *platform.libc_ver()]),
        "c": compiler(os.environ.get("CC", "cc")),
        "c++": compiler(os.environ.get("CXX", "c++")),
        **{name: os.environ.get(name, "") for name in FLAGS},
    }


def compiler(command: str) -> str:
    """Name, version and target of a compiler, and a hash of its macros, which tell the processor it compiles for."""
    native = "GGML_NATIVE=OFF" not in os.environ.get("CMAKE_ARGS", "")
    option = "-march=native" if platform.machine() == "x86_64" else "-mcpu=native"

    def says(*options: str) -> str:
        run = [*shlex.split(command), *options]
        return subprocess.run(run, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout

    try:
        macros = says(*[option] * native, "-dM", "-E", "-x", "c", "-")
        return f"{says('--version').splitlines()[0]}, {says('-dumpmachine').strip()}, {sha256(macros.encode())}"
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"llama.cpp needs a C and a C++ compiler, as apt's build-essential brings: {error}")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def danger(path: Path) -> str | None:
    """Why others may have written what lies at `path`, in words."""
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        return f"{path} is a link"
    if found.st_uid not in (os.geteuid(), 0):
        return f"{path} belongs to user {found.st_uid}"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write to {path} (mode {stat.S_IMODE(found.st_mode):o})"
    return None


def checked(folder: Path, wanted: dict[str, str]) -> Path | str:
    """The wheel in a folder of the cache, or why it is not used."""
    try:
        if said := danger(folder) or danger(folder / RECORD):
            return said
        built = json.loads((folder / RECORD).read_text())
        wheel = folder / str(built["wheel"])
        if said := danger(wheel):
            return said
        if built["recipe"] != wanted:
            return f"{folder / RECORD} tells of another build"
        if sha256(wheel.read_bytes()) != built["sha256"]:
            return f"{wheel} is not what was built: its SHA-256 is another"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{folder} cannot be used: {error}"
    return wheel


def cached(cache: Path, wanted: dict[str, str], build: Callable[[Path], None]) -> Path:
    """The wheel of this recipe, built into the cache where no good one lies. A second call waits for the first one's.

    Args:
        build: puts one wheel into the empty folder that it is given.
    """
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    cache = cache.resolve()
    if said := danger(cache):
        sys.exit(f"{said}: make it yours alone, or name another folder (make CACHE=…)")
    folder = cache / f"llama-{sha256(json.dumps(wanted, sort_keys=True).encode())[:16]}"
    with (cache / "llama.busy").open("w") as busy:
        fcntl.flock(busy, fcntl.LOCK_EX)
        found = checked(folder, wanted) if os.path.lexists(folder) else "no wheel of this source, compiler and flags"
        if isinstance(found, str):
            print(f"{found}; llama.cpp is built, which takes minutes", flush=True)
            replace(folder, wanted, build)
            found = checked(folder, wanted)
    return found if isinstance(found, Path) else sys.exit(found)


def replace(folder: Path, wanted: dict[str, str], build: Callable[[Path], None]) -> None:
    """Builds beside `folder` and moves it into place whole."""
    for left in folder.parent.glob("building-*"):  # by a build that was killed
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix="building-", dir=folder.parent) as temporary:
        new = Path(temporary, "new")
        new.mkdir(mode=0o700)
        build(new)
        (wheel,) = new.glob("*.whl")
        wheel.chmod(0o600)
        built = {"wheel": wheel.name, "sha256": sha256(wheel.read_bytes()), "recipe": wanted}
        (new / RECORD).write_text(json.dumps(built, indent=1))
        (new / RECORD).chmod(0o600)
        if os.path.lexists(folder):
            folder.rename(Path(temporary, "refused"))
        new.rename(folder)


def pip(*arguments: str | Path) -> None:
    if status := subprocess.run([sys.executable, "-m", "pip", *arguments]).returncode:
        sys.exit(status)


def build(folder: Path) -> None:
    # pip's own cache of wheels knows no flags.
    source = ("--no-binary", "llama-cpp-python", "--require-hashes", "--requirement", LOCK)
    pip("wheel", "--no-cache-dir", "--no-deps", "--no-build-isolation", *source, "--wheel-dir", folder)


def main() -> None:
    os.environ["CMAKE_ARGS"] = f"{OURS} {os.environ.get('CMAKE_ARGS', '')}".strip()
    # Forced: one of the same version but other flags may be there.
    pip("install", "--quiet", "--no-deps", "--force-reinstall", cached(Path(sys.argv[1]), recipe(), build))


if __name__ == "__main__":
    main()
