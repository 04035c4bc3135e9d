"""The whole test suite on three stacks: the least that pyproject allows, the pinned one, and the newest of everything.

    make versions                                            # hours; writes benchmarks/results/versions.json
    python benchmarks/versions.py --only newest              # one row, the others as they were
    python benchmarks/versions.py --only least --environment /path/to/venv    # an environment that is there already

Each row has an environment of its own, with the wheel of this checkout. `least`: the lower bounds of pyproject.toml,
and of the rest what pip finds to go with them. `pinned`: constraints.txt. `newest`: no constraints at all. torch is the
build that pip is offered; a CUDA build runs these tests on the CPU as well. A row is written as soon as it is there.
`ATEN_CPU_CAPABILITY=default` (or `avx2`, `avx512`) chooses torch's own kernels; the row says which it had.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import drawn

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "versions.json"
ROWS = ("least", "pinned", "newest")
PACKAGES = (
    "torch", "transformers", "accelerate", "peft", "trl", "bitsandbytes", "datasets", "highspy", "numpy", "safetensors",
)  # fmt: skip


def least() -> list[str]:
    """`torch>=2.11` in pyproject.toml as `torch==2.11.*`, and so on."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    bounds = (re.fullmatch(r"(torch|transformers)>=([\d.]+)", requirement) for requirement in asked)
    return sorted({f"{bound[1]}=={bound[2]}.*" for bound in bounds if bound})


def requirements(row: str, wheel: Path) -> list[str]:
    """What pip is told to install."""
    own = f"{wheel}[dev]"
    if row == "pinned":
        return ["-c", str(ROOT / "constraints.txt"), "torch", own]
    return [*(least() if row == "least" else []), own]


def install(row: str, folder: Path, *, made: bool) -> str:
    """Make the environment of `row`, or put the wheel into one that is there; why that cannot be, or nothing."""
    if made:
        venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    with tempfile.TemporaryDirectory() as dist:
        build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", dist, str(ROOT)]
        subprocess.run(build, check=True, capture_output=True)
        (wheel,) = Path(dist).glob("*.whl")
        pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
        asked = requirements(row, wheel) if made else ["--no-deps", "--force-reinstall", str(wheel)]
        done = subprocess.run([*pip, *asked], capture_output=True, text=True, check=False)
    return "" if not done.returncode else _last(done.stderr)


def tested(row: str, python: Path, tests: list[str]) -> dict[str, Any]:
    """What the suite says in the environment of `python`."""
    listed = subprocess.run([python, "-m", "pip", "list", "--format", "json"], capture_output=True, check=True)
    found = {each["name"]: each["version"] for each in json.loads(listed.stdout)}
    asked = subprocess.run(
        [python, "-c", "import torch; print(torch.backends.cpu.get_cpu_capability())"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    began = time.monotonic()
    # the checkout's own source, whether the environment has the wheel or not; a worker that crashes is not replaced,
    # since with its files dealt out again pytest-xdist waits for ever
    done = subprocess.run(
        [
            python, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--tb=short", "-n", "2", "--dist", "loadfile",
            "--max-worker-restart", "0", *tests,
        ],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={
            **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src"),
            "PATH": f"{python.parent}:{os.environ['PATH']}",
        },
    )  # fmt: skip
    return {
        "row": row,
        "installed": {name: found[name] for name in PACKAGES if name in found},
        "cpu_capability": asked.stdout.strip(),
    } | summary(done.stdout, done.returncode, time.monotonic() - began)


def summary(output: str, status: int, seconds: float) -> dict[str, Any]:
    """Counts and failures from what pytest printed."""
    last = output.strip().splitlines()[-1] if output.strip() else ""
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|deselected|error)", last)}
    return {
        "status": "passed" if status == 0 else "failed", **counts, "seconds": round(seconds),
        "tests_failed": re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE),
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": drawn.commit(),
    }  # fmt: skip


def record(found: dict[str, Any]) -> None:
    """Put one row into the results, the others as they were."""
    before = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if RESULTS.exists() else []
    rows = {each.get("row"): each for each in before if each.get("row") in ROWS} | {found["row"]: found}
    document = {"rows": [rows[name] for name in ROWS if name in rows]}
    drawn.write(RESULTS, document, parts=[found["row"]], torch=found["installed"]["torch"])


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "pip said nothing")[:300]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=ROWS, help="this row alone")
    parser.add_argument("--environment", type=Path, help="with --only: one that has the packages already")
    parser.add_argument("--tests", nargs="*", default=[], help="instead of the whole suite")
    asked = parser.parse_args()
    if asked.environment and not asked.only:
        parser.error("--environment is that of one row: say which with --only")
    failed = False
    for row in (asked.only,) if asked.only else ROWS:
        with tempfile.TemporaryDirectory(prefix="tightfit-versions-") as folder:
            environment = asked.environment or Path(folder)
            why = install(row, environment, made=asked.environment is None)
            found = (
                {"row": row, "status": "cannot be installed", "why": why}
                if why
                else tested(row, (environment / "bin" / "python").absolute(), asked.tests)
            )
        print(json.dumps(found), flush=True)
        if not asked.tests:
            record(found)
        failed |= found["status"] != "passed"
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
