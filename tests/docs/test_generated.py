"""The pages that the program writes are the ones on disk."""

from __future__ import annotations

import importlib.util
import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]


def test_pages_are_up_to_date() -> None:
    # A fresh process, because typer reads the terminal's width when it is imported.
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


#: That no card has run something. It would stay where it stands when one has.
BY_HAND = re.compile(
    r"\b(no (gpu|card) has (run|measured|been)|none has run it|never run on a gpu|(cuda|offload) was never run"
    r"|only cpus have run)\b",
    re.IGNORECASE,
)


def test_that_no_card_has_run_is_said_by_results_alone(generate: ModuleType) -> None:
    """`gpu_measured.json` of the first session takes it out of every page, because no page says it by itself."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]
    sources = [*(ROOT / "src").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    own = {ROOT / "CHANGELOG.md", ROOT / "docs" / "log.md", generate.GPU, Path(__file__)}  # two tell of their day
    own |= {ROOT / "tests" / "test_gpu_kit.py", ROOT / "docs" / "generate.py"}
    for path in {*pages, *sources} - own:
        text = generate.MEASURED.sub("", path.read_text(encoding="utf-8"))
        found = BY_HAND.search(" ".join(text.split()))
        assert not found, f"{path}: {found and found[0]}: link to docs/gpu.md"


# ----------------------------------------------------------------------------- the picture of the packages

Box = tuple[float, float, float, float]  # left, top, right, bottom
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def texts(root: ElementTree.Element) -> list[tuple[str, Box]]:
    """Each text with the room it takes in a typeface of fixed width."""
    found = []
    for text in root.iter(f"{SVG}text"):
        x, y, size = (float(text.attrib[name]) for name in ("x", "y", "font-size"))
        wide = 0.6 * size * len(text.text or "")
        left = x if text.attrib["text-anchor"] == "start" else x - wide / 2
        found.append((text.text or "", (left, y - size, left + wide, y + size / 4)))
    return found


def boxes(root: ElementTree.Element) -> list[Box]:
    sides = (
        [float(rect.attrib.get(name, 0)) for name in ("x", "y", "width", "height")] for rect in root.iter(f"{SVG}rect")
    )
    return [(x, y, x + wide, y + high) for x, y, wide, high in sides if wide == 190]


def points(root: ElementTree.Element) -> Iterator[tuple[float, float]]:
    """Places on the lines, one for each pixel or so, without their ends, which touch a box."""
    for path in root.iter(f"{SVG}path"):
        if path.attrib["fill"] == "none":
            corners = [tuple(map(float, each.split())) for each in re.split("[ML]", path.attrib["d"]) if each.strip()]
            for (x, y), (to_x, to_y) in itertools.pairwise(corners):
                steps = int(max(abs(to_x - x), abs(to_y - y)))
                yield from ((x + (to_x - x) * i / steps, y + (to_y - y) * i / steps) for i in range(1, steps))


def test_nothing_in_the_picture_lies_on_something_else(generate: ModuleType) -> None:
    root = ElementTree.fromstring(generate.architecture_svg())
    found = texts(root)
    assert {text for text, _ in found} >= set(generate.IN_A_WORD)
    for (text, one), (other_text, other) in itertools.combinations(found, 2):
        assert not overlap(one, other), (text, other_text)
    for one, other in itertools.combinations(boxes(root), 2):
        assert not overlap(one, other)
    inside = [
        (x, y)
        for x, y in points(root)
        if any(overlap((x, y, x, y), box) for box in (*boxes(root), *dict(found).values()))
    ]
    assert not inside


def test_a_circle_of_packages_is_refused(generate: ModuleType) -> None:
    circle = {"a": frozenset({"b"}), "b": frozenset({"a"}), "c": frozenset()}
    packages = generate.Packages(imports=circle, at_once=circle, torch={}, said={})
    with pytest.raises(SystemExit, match="circle: it is among a, b"):
        packages.rows()


def test_an_arrow_that_follows_from_others_is_left_out(generate: ModuleType) -> None:
    imports = {"a": frozenset({"b", "c"}), "b": frozenset({"c"}), "c": frozenset()}
    packages = generate.Packages(imports=imports, at_once=imports, torch={}, said={})
    assert packages.rows() == [["c"], ["b"], ["a"]]
    assert packages.arrows() == [("a", "b"), ("b", "c")]
