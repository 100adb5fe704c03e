"""The terminal. Text is shown as it is: no markup, no emoji codes, nothing that a terminal would obey."""

from __future__ import annotations

import math
import re
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import NoReturn, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
_BETWEEN_LINES_S = 10.0


class _Plain(Console):
    def __init__(self, stderr: bool = False, width: int | None = None) -> None:
        super().__init__(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)

    def on_broken_pipe(self) -> NoReturn:
        """rich would end the process with exit status 1, which is a DEFECT here."""
        raise BrokenPipeError


err = _Plain(stderr=True)
out = _Plain(width=None if sys.stdout is not None and sys.stdout.isatty() else 160)


def printable(text: str) -> str:
    """`text` in one line that any terminal, page or table shows: control and format characters, and bytes of a name
    that were no UTF-8 (surrogates), as backslash escapes."""
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:  # how Python keeps a byte that is no UTF-8
        return f"\\x{number - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def warn(text: str) -> None:
    """One line on standard error."""
    err.print(f"warning: {printable(text)}", soft_wrap=True)


def progress(disable: bool = False) -> Progress:
    """A bar on standard error, if that is a terminal, which is gone when it ends; it leaves standard output alone."""
    disable = disable or not err.is_terminal
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(
        *columns, console=err, transient=True, redirect_stdout=False, redirect_stderr=False, disable=disable
    )


def track(items: Iterable[T], description: str, total: int | None = None, disable: bool = False) -> Iterator[T]:
    """`items` as they are, with a bar beside them; a line every ten seconds where standard error is no terminal."""
    if err.is_terminal or disable:
        with progress(disable) as bar:
            yield from bar.track(items, total=total, description=printable(description))
        return
    whole = total if total is not None or not isinstance(items, Sized) else len(items)
    said = time.monotonic()
    for number, item in enumerate(items):
        if time.monotonic() - said >= _BETWEEN_LINES_S:
            said = time.monotonic()
            err.print(f"{printable(description)}: {number}{'' if whole is None else f' of {whole}'}", soft_wrap=True)
        yield item


@contextmanager
def steps() -> Iterator[Callable[[str], None]]:
    """Gives what tells the step at hand: in a line that changes, or line by line where standard error is no terminal.

    Steps that differ in their numbers alone are one there, told again every ten seconds.
    """
    if err.is_terminal:
        with err.status("") as status:
            yield lambda step: status.update(printable(step))
        return
    said: dict[str, float] = {}

    def tell(step: str) -> None:
        kind = re.sub(r"\d+", "", step)
        if time.monotonic() - said.get(kind, -math.inf) >= _BETWEEN_LINES_S:
            said[kind] = time.monotonic()
            err.print(printable(step), soft_wrap=True)

    yield tell
