"""The site builds without a warning, and its pages ask no other host for anything."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OTHER_HOST = re.compile(r"(?:[a-z]+:)?//", re.IGNORECASE)
#: Attributes that a browser fetches by itself; an `a` is followed by the reader.
FETCHED = {
    "script": ("src",),
    "link": ("href",),
    "img": ("src", "srcset"),
    "iframe": ("src",),
    "source": ("src", "srcset"),
}

needs_generator = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("material") is None,
    reason="mkdocs-material is not installed: make site, or pip install -c constraints.txt -e '.[docs]'",
)


class Fetches(HTMLParser):
    """What loading a page makes a browser fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name in FETCHED.get(tag, ()) and value is not None]


def fetched(html: str) -> list[str]:
    parser = Fetches()
    parser.feed(html)
    return parser.found


def test_a_fetch_from_another_host_is_seen() -> None:
    html = '<link href="https://fonts.example/a.css"><img src="a.png"><script src="//cdn.example/a.js"></script>'
    assert [url for url in fetched(html) if OTHER_HOST.match(url)] == [
        "https://fonts.example/a.css",
        "//cdn.example/a.js",
    ]


def test_every_page_is_in_the_navigation() -> None:
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    left_out = {"forecast_head.md"}  # a part of forecast.md
    for page in sorted((ROOT / "docs").rglob("*.md")):
        name = page.relative_to(ROOT / "docs").as_posix()
        assert name in left_out or f": {name}\n" in settings, f"{name} is not in mkdocs.yml"


@needs_generator
def test_the_site(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        urls = fetched(page.read_text(encoding="utf-8"))
        assert urls, page
        away = [url for url in urls if OTHER_HOST.match(url)]
        assert not away, f"{page.name} fetches {away}"
        if page.name != "404.html":  # its addresses begin at the server's root
            gone = [url for url in urls if not (page.parent / url.split("#")[0].split("?")[0]).exists()]
            assert not gone, f"{page.name}: {gone} are not there"
    for sheet in tmp_path.rglob("*.css"):
        assert not re.search(r"url\(\s*['\"]?(?:https?:)?//|@import", sheet.read_text(encoding="utf-8")), sheet
