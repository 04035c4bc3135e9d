"""Which device a step runs on is asked in one place, `tightfit.accelerator`: every card takes the same path.

A module names a kind of device where a string of its code is one (`"cuda"`, `"cpu:0"`), or where it reaches for what
torch keeps for one kind alone (`torch.cuda...`, `tensor.is_cuda`, `tensor.cpu()`). Text for people may name what it
likes. What remains outside the room is listed here, with its reason.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "tightfit"

KINDS = ("cpu", "cuda", "hip", "hpu", "mps", "mtia", "rocm", "xla", "xpu")
_NAMED = re.compile(rf"({'|'.join(KINDS)})(:\d+)?")
_ATTRIBUTES = frozenset({*(f"is_{kind}" for kind in KINDS), "cpu", "cuda"})

#: What holds a `trace.fake.FakeStep`, whose `cuda` says that CUDA's kernels are modelled.
FAKE_STEPS = ("self", "step", "self.fake")

#: How often each module outside the room names a kind, and why it must.
ALLOWED = {
    "core/recorded.py": (1, "HOST_KIND, which everything else says instead of the name"),
    "catalog/__init__.py": (6, "the kinds that an entry of the catalog may have, and the default of an entry"),
    "device/cost.py": (2, "the nominal card is CUDA's"),
    "trace/fake.py": (1, "cuBLAS's workspace is CUDA's alone"),
    "integrations/transformers.py": (1, "the default of a public function, as its users read it"),
    "forecast/room.py": (1, "Metal's limit for one process is Apple's alone"),
    "doctor/__init__.py": (2, "`--kernels` says whose kernels are modelled: CUDA's or the host's"),
    "cli/doctor.py": (2, "`--kernels`, as above"),
}


def names(source: str) -> Iterator[tuple[int, str]]:
    """(line number, name) of each kind of device that `source` names in code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and _NAMED.fullmatch(node.value):
            yield node.lineno, repr(node.value)
        elif isinstance(node, ast.Attribute) and (node.attr in _ATTRIBUTES or (of_torch(node) and node.attr in KINDS)):
            if ast.unparse(node.value) not in FAKE_STEPS:
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch."):
            found = set((node.module or "").split(".")) & set(KINDS)
            yield from [(node.lineno, kind) for kind in found]


def of_torch(node: ast.Attribute) -> bool:
    inner: ast.expr = node
    while isinstance(inner, ast.Attribute):
        inner = inner.value
    return isinstance(inner, ast.Name) and inner.id == "torch"


def test_no_module_outside_the_room_names_a_kind_of_device() -> None:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        where = path.relative_to(PACKAGE).as_posix()
        if not where.startswith("accelerator/"):
            found[where] = list(names(path.read_text(encoding="utf-8")))
    counted = Counter({where: len(each) for where, each in found.items() if each})
    allowed = Counter({where: count for where, (count, _) in ALLOWED.items()})
    more = [f"{where}: {found[where]}" for where in counted - allowed]
    assert not more, "ask tightfit.accelerator instead:\n" + "\n".join(more)
    assert not allowed - counted, f"fewer than allowed, lower the count: {dict(allowed - counted)}"


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ('if device.type == "cuda": pass', 1),
        ('if device.type in ("cpu", "mps:0"): pass', 2),
        ("torch.cuda.synchronize()", 1),
        ("torch.backends.cuda.enable_flash_sdp(True)", 1),
        ("if tensor.is_cuda: pass", 1),
        ("tensor = tensor.cpu()", 1),
        ("from torch.cuda import Stream", 1),
        ('"""Runs on cuda or cpu."""', 0),
        ('raise InvalidInput("use cpu or cuda")', 0),
        ("if step.cuda: pass", 0),  # a fake step's kernels
        ('tensor.to("cpu", copy=True)', 1),
    ],
)
def test_what_counts(source: str, count: int) -> None:
    assert len(list(names(source))) == count
