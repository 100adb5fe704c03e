"""Run every parser of what comes from outside on altered input, a million times in all, and write what was found.

    pip install --target /tmp/atheris atheris==3.0.0        (CPython 3.11 to 3.13, Linux)
    python benchmarks/fuzz.py --atheris /tmp/atheris

The parsers and their seeds are those of tests/parsers.py. Each runs in a process of its own, first on inputs that
hypothesis makes (values of JSON exchanged, bytes altered), then on those that atheris finds by the branches that they
take. A fault is an exception that the parser's docstring does not promise, a sentence with a library's inside in it, a
process that dies (abort, segmentation fault), one input that takes more than 5 s of processor time, or more than 4 GiB.

Figures go to docs/measured/fuzz.md; inputs that are faults stay in --folder, each beside what it did.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from vmad_edge.runtime.files import write_whole
from vmad_edge.runtime.machine import Run, RunInProgress

ROOT = Path(__file__).parents[1]
SECONDS = 5.0
"""Of processor time, for one input."""
MEMORY = 4 << 30
LARGEST = 1 << 13
"""Bytes of an input that atheris makes."""
HYPOTHESIS_SHARE = 0.01
"""It makes some hundred inputs a second, atheris thousands."""
SLOW = {"frame": 0.5, "mask": 0.5, "preprocessor config": 0.5, "Real-IAD table": 0.5, "VisA table": 0.5}
"""Parsers that get less than an equal share."""


class Progress:
    """Shared between a process and its parent: executions begun and ended, and the last input."""

    SIZE = 24 + (1 << 20)

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(self.SIZE))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), self.SIZE)

    def begin(self, data: bytes) -> None:
        kept = data[: self.SIZE - 24]
        self._map[24 : 24 + len(kept)] = kept
        struct.pack_into("<QQ", self._map, 8, len(kept), self.begun + 1)

    def end(self) -> None:
        struct.pack_into("<Q", self._map, 0, self.ended + 1)

    @property
    def ended(self) -> int:
        return int(struct.unpack_from("<Q", self._map, 0)[0])

    @property
    def begun(self) -> int:
        return int(struct.unpack_from("<Q", self._map, 16)[0])

    @property
    def last(self) -> bytes:
        return self._map[24 : 24 + struct.unpack_from("<Q", self._map, 8)[0]]

    def forgive(self) -> None:
        """Count what was begun and did not end."""
        struct.pack_into("<Q", self._map, 0, self.begun)


def note(folder: Path, parser: str, what: str, where: str, data: bytes) -> None:
    """Keep a fault, once for each place where it comes from."""
    name = hashlib.sha256(f"{parser} {what.split(':')[0]} {where}".encode()).hexdigest()[:12]
    path = folder / "faults" / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"parser": parser, "what": what[:500], "where": where}, indent=2))
        path.with_suffix(".bin").write_bytes(data)


def place(error: BaseException) -> str:
    """The innermost line of ours."""
    ours = [f for f in traceback.extract_tb(error.__traceback__) if "vmad_edge" in f.filename]
    return f"{ours[-1].filename.partition('vmad_edge/')[2]}:{ours[-1].name}" if ours else "tests/parsers.py"


# ------------------------------------------------------------------------------------------- the child's side


def child(parser: str, engine: str, executions: int, seed: int, folder: Path) -> None:
    progress = Progress(folder / "progress")

    def once(data: bytes) -> None:
        progress.begin(data)
        try:
            run(data, scratch)
        except BaseException as error:  # a panic in Rust is no Exception; and the next inputs may show other faults
            note(folder, parser, f"{type(error).__name__}: {error}", place(error), data)
        progress.end()

    if engine == "atheris":
        import atheris

        with atheris.instrument_imports(include=["vmad_edge", "PIL"]):
            import parsers
    else:
        import parsers
    run = parsers.PARSERS[parser].run
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as temporary:
        scratch = Path(temporary, "scratch")
        scratch.mkdir()
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        if engine == "atheris":
            _atheris(parser, once, executions, seed, folder / "corpus")
        else:
            _hypothesis(parser, once, executions, seed)


def _hypothesis(parser: str, once: Callable[[bytes], None], executions: int, seed: int) -> None:
    import hypothesis
    import parsers

    settings = hypothesis.settings(
        max_examples=executions,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.seed(seed)(settings(hypothesis.given(parsers.altered(parsers.PARSERS[parser]))(once)))()


def _atheris(parser: str, once: Callable[[bytes], None], executions: int, seed: int, corpus: Path) -> None:
    import atheris
    import parsers

    corpus.mkdir(exist_ok=True)
    for number, data in enumerate(parsers.PARSERS[parser].seeds()):
        (corpus / f"seed{number}").write_bytes(data)
    words = corpus.with_name("words")
    tokens = [*parsers.TOKENS, *parsers.NUMBERS]
    words.write_text("".join('"' + "".join(f"\\x{b:02x}" for b in token[:64]) + '"\n' for token in tokens))
    options = {
        "runs": executions,
        "seed": seed,
        "max_len": LARGEST,
        "len_control": 0,
        "timeout": 3600,
        "rss_limit_mb": 0,
        "dict": words,
    }
    atheris.Setup([sys.argv[0], *(f"-{k}={v}" for k, v in options.items()), "-print_final_stats=1", str(corpus)], once)
    atheris.Fuzz()


# ------------------------------------------------------------------------------------------ the parent's side


def drive(parser: str, engine: str, executions: int, seed: int, folder: Path, path: list[str]) -> int:
    """Run until so many executions are done; a child that dies or hangs is a fault, and the next one goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    progress = Progress(folder / "progress")
    first = progress.ended
    while (left := executions - (progress.ended - first)) > 0:
        before = progress.ended
        command = [sys.executable, __file__, "--child", parser, engine, str(left), str(seed), str(folder)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")])}
        with (folder / f"{engine}.log").open("ab") as log:
            process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
            hung = _wait(process, progress)
        if progress.begun > progress.ended and (hung or process.returncode < 0 or engine == "atheris"):
            status = process.returncode
            how = f"took more than {SECONDS:g} s" if hung else f"ended the process (exit status {status})"
            note(folder, parser, how, "hang" if hung else f"signal {-status}", progress.last)
            progress.forgive()
        elif progress.ended == before:  # nothing begun: no fault of the parser
            print(f"{parser}, {engine}: no execution (see {folder / engine}.log)", file=sys.stderr)
            break
        seed += 1
    return progress.ended - first


def _wait(process: subprocess.Popen[bytes], progress: Progress) -> bool:
    """Until it ends; whether one input took so long that it was killed."""
    begun, since = -1, 0.0
    while process.poll() is None:
        used = _processor_seconds(process.pid)
        if progress.begun != begun or progress.begun == progress.ended:
            begun, since = progress.begun, used
        elif used - since > SECONDS:
            process.kill()
            process.wait()
            return True
        time.sleep(0.2)
    return False


def _processor_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        parser, engine, executions, seed, folder = sys.argv[2:]
        child(parser, engine, int(executions), int(seed), Path(folder))
        return
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument(
        "--executions", type=int, default=1_000_000, help="of all parsers together (default 1000000)"
    )
    arguments.add_argument("--atheris", metavar="FOLDER", help="where pip put it; without: hypothesis alone")
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--only", nargs="*", metavar="PARSER", help="default: all")
    arguments.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "vmad-fuzz"), help="for faults")
    arguments.add_argument("--out", type=Path, help="write the figures here (docs/measured/fuzz.md)")
    args = arguments.parse_args()
    path = [str(ROOT / "tests"), *([args.atheris] if args.atheris else [])]
    sys.path[:0] = path
    import parsers

    progress = RunInProgress()
    names = (args.only or list(parsers.PARSERS)) if args.executions else []  # none: the page alone
    weights = {name: SLOW.get(name, 1.0) for name in names}
    for name in names:
        total = round(args.executions * weights[name] / sum(weights.values()))
        by_hypothesis = round(total * HYPOTHESIS_SHARE) if args.atheris else total
        start, folder = time.perf_counter(), args.folder / name.replace(" ", "_")
        done = {"hypothesis": drive(name, "hypothesis", by_hypothesis, args.seed, folder, path)}
        done["atheris"] = drive(name, "atheris", total - by_hypothesis, args.seed, folder, path) if args.atheris else 0
        row = {"parser": name, "commit": commit(), "seed": args.seed, **done}
        row |= {"faults": faults_in(folder), "minutes": round((time.perf_counter() - start) / 60, 1)}
        with (args.folder / "rows.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)
    if args.out:
        write_whole(args.out, page(args.folder, progress.end(("atheris", "hypothesis", "safetensors", "pydantic"))))


def commit() -> str:
    """Of this tree, with a + if it was changed since."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return head + ("+" if changed else "")


def faults_in(folder: Path) -> list[str]:
    found = [json.loads(path.read_text()) for path in sorted((folder / "faults").glob("*.json"))]
    return [f"{fault['what'].partition(':')[0]} in {fault['where']}" for fault in found]


def page(folder: Path, run: Run) -> str:
    """docs/measured/fuzz.md, of all runs whose figures are in `folder`."""
    import parsers

    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    total = sum(row["hypothesis"] + row["atheris"] for row in rows)
    versions = ", ".join(f"{package} {version}" for package, version in run.versions.items())
    text = [
        "# Every parser on altered input\n",
        f"{total:,} executions, counted by the processes that ran them. Made by `benchmarks/fuzz.py`, whose docstring "
        "says what a fault is; the parsers, seeds and alterations are those of `tests/parsers.py`. A row is one run of "
        "`python benchmarks/fuzz.py --atheris FOLDER --only PARSER … --seed SEED --executions NUMBER`.\n",
        "| parser | executions | by hypothesis | by atheris | faults | minutes | seed | commit |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
        *(
            f"| {row['parser']} | {row['hypothesis'] + row['atheris']:,} | {row['hypothesis']:,} | {row['atheris']:,} "
            f"| {len(row['faults'])} | {row['minutes']} | {row['seed']} | {row['commit']} |"
            for row in rows
        ),
        "\nMinutes are by the clock, on a machine that others may have used too.\n",
        f"- This page: `{run.command}`, {run.date}.",
        f"- Machine: {run.machine.processor}, {run.machine.cores} cores, {run.machine.memory_gib} GiB, "
        f"{run.machine.system}.",
        f"- Versions: {versions}.",
        "\n## Faults of these runs\n",
        *([f"- {row['parser']}: {fault}" for row in rows for fault in row["faults"]] or ["None."]),
        "\n## Faults of the past\n",
        f"{len(parsers.PAST)} inputs that were faults, found by these parsers' earlier runs, by tables of edges and by "
        "reading; all are mended, and `tests/runtime/test_fuzz.py` runs them again.\n",
        *(f"- {parser}: {what}" for what, (parser, _) in parsers.PAST.items()),
    ]
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    main()
