"""Fills the pages that are made for people: for any browser, from a file, without a network."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from pathlib import Path

from vmad_edge.runtime.console import printable

_MARK = re.compile(r"{{(\w+)}}")
_STYLE = Path(__file__).with_name("pages.css")


def template(page: Path) -> str:
    """The page with its marks, `{{name}}`, and the style that all pages share."""
    return filled(page.read_text("utf-8"), {"style": _STYLE.read_text("utf-8")}, partly=True)


def filled(text: str, marks: Mapping[str, str], partly: bool = False) -> str:
    """HTML in place of the marks; what is put in is not searched for more of them.

    Args:
        partly: leave other marks for later.
    """
    return _MARK.sub(lambda mark: marks.get(mark[1], mark[0]) if partly else marks[mark[1]], text)


def escaped(text: str) -> str:
    """Any text as HTML that shows it, in one line."""
    return html.escape(printable(text))


def described(facts: Mapping[str, str]) -> str:
    """Names and what they are, as the items of a `<dl>`."""
    return "\n".join(f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd></div>" for name, value in facts.items())
