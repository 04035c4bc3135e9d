"""The integrations' tests under other releases of transformers and torch, each in an environment of its own.

    make versions          # slow: gigabytes and minutes per row; writes benchmarks/results/versions.json
    python benchmarks/versions.py --only transformers==5.17.0,torch==2.13.0

Environments are made in a temporary folder and thrown away. torch is taken as a CPU build; a release that pip cannot
get as one here is a row that says so, and no row is left out. `newest` is whatever pip finds to be it.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import venv
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tightfit.step import environment

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "versions.json"
ROWS = [
    ("5.17.0", "2.13.0"), ("newest", "2.13.0"), ("5.17.0", "2.11.0"), ("newest", "2.11.0"),
]  # fmt: skip
TESTS = ["tests/integrations", "tests/test_switches.py"]
#: The other packages of the rows are those of the project, so that only what is named differs.
SAME = ("accelerate", "bitsandbytes", "datasets", "highspy", "numpy", "peft", "tokenizers", "trl")


def run(command: list[str], seconds: int, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds, **more)


def row(transformers: str, torch: str) -> dict[str, Any]:
    said: dict[str, Any] = {"transformers": transformers, "torch": torch}
    with tempfile.TemporaryDirectory(prefix="tightfit-versions-") as folder:
        python = str(Path(folder) / "bin" / "python")
        venv.create(folder, with_pip=True)
        pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
        cpu = f"torch=={torch}+cpu"
        done = run([*pip, cpu], 1800)
        if done.returncode:
            return said | {"status": "not available here", "why": _last(done.stderr)}
        wanted = "transformers" if transformers == "newest" else f"transformers=={transformers}"
        pinned = Path(folder) / "constraints.txt"
        lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        pinned.write_text("\n".join(x for x in lines if x.split("==")[0] in SAME), encoding="utf-8")
        done = run([*pip, "-c", str(pinned), cpu, wanted, f"{ROOT}[dev]"], 1800)
        if done.returncode:
            # the newest of a peer may refuse the old transformers: let pip choose the peers then
            done = run([*pip, cpu, wanted, f"{ROOT}[dev]"], 1800)
        if done.returncode:
            return said | {"status": "cannot be installed", "why": _last(done.stderr)}
        listed = json.loads(run([python, "-m", "pip", "list", "--format", "json"], 300).stdout)
        found = {each["name"]: each["version"] for each in listed}
        said["installed"] = {name: found[name] for name in ("transformers", "torch", *SAME) if name in found}
        tests = run(
            [python, "-m", "pytest", "-q", "-n", "2", *TESTS], 3600, cwd=ROOT,
            env={"PATH": f"{folder}/bin:/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": folder},
        )  # fmt: skip
        counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|error)", tests.stdout[-400:])}
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", tests.stdout, re.MULTILINE)
        return said | {"status": "passed" if tests.returncode == 0 else "failed", **counts, "tests_failed": failed}


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "pip said nothing")[:300]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="transformers==X,torch==Y: this row alone, the others as they were")
    only = parser.parse_args().only
    wanted = ROWS
    if only:
        match = re.fullmatch(r"transformers==(\S+),torch==(\S+)", only)
        if match is None:
            raise SystemExit(f"expected transformers==X,torch==Y, not {only!r}")
        wanted = [(match[1], match[2])]
    before = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if RESULTS.exists() else []
    rows = {(each["transformers"], each["torch"]): each for each in before}
    for transformers, torch in wanted:
        rows[transformers, torch] = found = row(transformers, torch)
        print(json.dumps(found), flush=True)
        record = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"), "environment": environment(), "tests": TESTS,
            "rows": list(rows.values()),
        }  # fmt: skip
        RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return int(any(each["status"] == "failed" for each in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
