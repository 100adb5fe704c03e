"""Links of the pages lead somewhere, and the front page stays short."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("README.md", "docs/**/*.md", "benchmarks/results/*.md", "demo/checkpoint/MODEL_CARD.md")
    for path in ROOT.glob(pattern)
)


def inlines(page: Path) -> Iterator[tuple[Token, Token]]:
    """Each piece of running text, and what it stands in."""
    tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text("utf-8"))
    yield from ((token, before) for before, token in pairwise(tokens) if token.type == "inline")


def links(page: Path) -> Iterator[str]:
    for inline, _ in inlines(page):
        for token in inline.children or ():
            target = token.attrGet("href") or token.attrGet("src")
            if target is not None:
                yield str(target)


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = (inline.content.lower() for inline, before in inlines(page) if before.type == "heading_open")
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_somewhere(page: str) -> None:
    for target in links(ROOT / page):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        there = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert there.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(there), f"{page}: {target}"


def test_the_pages_have_links_and_anchors() -> None:
    assert "docs/first-day.md" in set(links(ROOT / "README.md"))
    assert "what-good-promises" in anchors(ROOT / "README.md")


def test_the_front_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 140
