"""Shared set-up: quiet libraries, no network, the benchmarks' harnesses within reach."""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests import by_the_book

os.environ.setdefault("KINETO_LOG_LEVEL", "6")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["HF_HUB_OFFLINE"] = "1"
# what was measured on the machine of whoever runs the tests is not for them
os.environ["TIGHTFIT_CALIBRATION"] = "none"
# torch finds code that it compiled for AVX-512 again when it is told to use AVX2, and that gives wrong numbers (2.13)
if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{capability}")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))  # its scripts share `drawn`, as they do when they are run; last, so it shadows nothing


def load_benchmark(name: str) -> ModuleType:
    """A script of `benchmarks/` as a module, so that tests and benchmarks run the same harness."""
    key = f"benchmarks_{name}"
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, BENCHMARKS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[key] = module
        spec.loader.exec_module(module)
    return sys.modules[key]


@pytest.fixture(scope="module", autouse=True)
def imports_are_no_garbage() -> None:
    """What is there when a file's tests begin is not looked at again when Python, accelerate or a recording look for
    garbage: a million objects of torch, transformers and the tests themselves, each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def seconds_by_the_book() -> Iterator[list[tuple[Any, str, Any]]]:
    """Ops take what their FLOPs and bytes say: a test plans the same each time, and steps that are alike share the
    planner's tables. A test of what is measured asks for `clock`."""
    with by_the_book.seconds_by_the_book() as measured:
        yield measured


@pytest.fixture
def clock(seconds_by_the_book: list[tuple[Any, str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops are timed, as they are for users."""
    for each in seconds_by_the_book:
        monkeypatch.setattr(*each)


@pytest.fixture(scope="module")
def short_studies() -> Iterator[None]:
    """Pages have few plans for other budgets, which nobody looks at; that there are many is tested in
    `report/test_html.py`."""
    import tightfit.report
    from tightfit.train import record

    few = functools.partial(tightfit.report.study, points=3)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tightfit.report, "study", few)
        patched.setattr(record, "study", few)
        yield


@pytest.fixture(scope="session")
def zoo() -> ModuleType:
    return load_benchmark("zoo")


@pytest.fixture(scope="session")
def random_modules() -> ModuleType:
    return load_benchmark("random_modules")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A headless Chromium; `chromium.page()` is a tab."""
    page = load_benchmark("page")
    if page.CHROMIUM is None:
        pytest.skip("no Chromium on this machine (apt install chromium)")
    with page.browser() as browser:
        yield browser
