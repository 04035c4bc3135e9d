"""Measure everything that only a card can tell, in one call of six minutes.

    python benchmarks/gpu/run.py --out runs/gpu                 # on the card
    python benchmarks/gpu/run.py --out runs/dry --dry-run       # the same code on the CPU, with tiny shapes
    python benchmarks/gpu/run.py --out runs/gpu --steps memory-B,time
    python benchmarks/gpu/run.py --out runs/gpu --fold          # only make results.json of the lines that are there

The steps stand in `LIMITS`, the most important first. Each is a process of its own with a limit of its own, so
that one which hangs or crashes costs only itself. All limits together are within the six minutes, so a step cannot take
the time of a later one: it may only take what earlier ones have left. A step writes each result as a line of
`lines.jsonl` when it has it, and what is there when time is up stays. At the end the lines are folded into
`results.json`, with the outcome of every step. A second call with the same `--out` appends.

Exit status: 0 if every step ended well and no row of one failed, 1 if not, 2 for wrong input.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib.metadata
import importlib.util
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent)]
#: The steps, the most important first, and the seconds that each is sure of. `steps.STEPS` says what they do; it needs
#: torch, which this process does without: only the process that the steps are forked from spends time on importing it.
LIMITS: dict[str, float] = {
    "environment": 10,
    "repeatability": 15,
    "gradients": 35,
    "calibration": 25,  # before `time`, `offload` and `compiled`, whose plans reckon with it
    "memory-B": 25,
    "memory-C": 25,
    "memory-A": 30,
    "time": 25,
    "offload": 25,
    "memory-D": 30,
    "nf4": 15,
    "streamed": 10,
    "state": 10,
    "overhead": 10,
    "memory-S": 10,
    "compiled": 30,  # takes whatever is left, since nothing comes after it
}
ALL_SECONDS = 360
#: Of them, for importing what all steps need and for ending steps that hang.
START_SECONDS = 30
#: A step may take so many times its limit of what earlier ones have left over.
MOST_TIMES = 3
assert sum(LIMITS.values()) + START_SECONDS <= ALL_SECONDS
#: A step is not begun with less than this left.
LEAST_SECONDS = 5
#: Read once, by the process that the steps are forked from.
PRELOADED = ["torch", "transformers", "steps"]


def device_file(folder: Path, *, is_dry: bool) -> Path:
    """What the step `calibration` has measured: of the card, or in a dry run of the CPU."""
    return folder / ("dry-device.json" if is_dry else "device.json")


class Lines:
    """A file of JSON lines. Each is written whole, at once, so a process that is killed loses no other line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: dict[str, Any]) -> None:
        data = json.dumps({"at": datetime.now(UTC).isoformat(timespec="milliseconds"), **record}) + "\n"
        handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(handle).st_size
            torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
            os.write(handle, ("\n" + data if torn else data).encode())
            os.fsync(handle)
        finally:
            os.close(handle)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the machine went away in the middle of a line
                record = None
            yield record if isinstance(record, dict) and "step" in record else {"step": "", "torn": line[:80]}


def _die_with_parent() -> None:
    """End this process group when the kit's own process is gone, killed or not."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def run_step(name: str, is_dry: bool, folder: str) -> None:
    """One step, in its own process."""
    os.setsid()  # so that its children can be ended with it
    _die_with_parent()
    log = os.open(Path(folder) / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable()
    lines = Lines(Path(folder) / "lines.jsonl")
    try:
        import steps
        from card import Card

        measured = device_file(Path(folder), is_dry=is_dry)
        # the plans of later steps reckon with it; no file of the user's is taken
        os.environ["TIGHTFIT_CALIBRATION"] = str(measured) if measured.exists() else "none"
        for record in steps.STEPS[name](Card(is_dry=is_dry, folder=Path(folder))):
            lines.append({"step": name, **record})
    except BaseException as error:
        traceback.print_exc()
        lines.append({"step": name, "error": f"{type(error).__name__}: {error}"[:2000]})
        sys.exit(1)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


_TOUCHED, _NO_CARD = 3, 4


def _probe(is_dry: bool) -> None:
    """Has the process that steps are forked from touched the card? Then its children could not."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda._is_in_bad_fork():
        sys.exit(_TOUCHED)
    if torch is not None and not is_dry and not torch.cuda.is_available():
        sys.exit(_NO_CARD)


def fork_or_spawn(is_dry: bool) -> Any:
    """Processes that begin with everything imported, where that can be had. None: there is no card."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    probe: Any = context.Process(target=_probe, args=(is_dry,))
    probe.start()
    probe.join()
    if probe.exitcode == _NO_CARD:
        return None
    return context if probe.exitcode == 0 else multiprocessing.get_context("spawn")


def end(process: Any) -> None:
    """End the step and whatever it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.join(10)


def limit_of(name: str, later: list[str], left: float) -> float:
    """The seconds that `name` may take of the `left` ones: its own, and what is not promised to the steps after it."""
    own = LIMITS[name]
    spare = left - sum(LIMITS[each] for each in later)
    return min(left, max(own, spare if not later else min(spare, MOST_TIMES * own)))


def run(names: list[str], is_dry: bool, folder: Path, all_seconds: float, step_seconds: float | None) -> bool:
    lines = Lines(folder / "lines.jsonl")
    started = time.monotonic()
    context = fork_or_spawn(is_dry)
    if context is None:
        print("torch finds no CUDA device on this machine: run where there is one, or with --dry-run", file=sys.stderr)
        raise SystemExit(2)
    well = True
    if "calibration" in names:  # measured anew
        device_file(folder, is_dry=is_dry).unlink(missing_ok=True)
    for turn, name in enumerate(names):
        left = all_seconds - (time.monotonic() - started)
        if left < LEAST_SECONDS:
            lines.append({"step": name, "outcome": "not begun: no time was left", "seconds": 0.0})
            well = False
            continue
        begun = time.monotonic()
        limit = limit_of(name, names[turn + 1 :], left) if step_seconds is None else min(left, step_seconds)
        process = context.Process(target=run_step, args=(name, is_dry, str(folder)))
        process.start()
        process.join(limit)
        if process.is_alive():
            end(process)
            outcome = f"ended after its {limit:.0f} seconds"
        elif process.exitcode:
            outcome = f"failed with exit status {process.exitcode}"
        else:
            outcome = "done"
        seconds = round(time.monotonic() - begun, 2)
        lines.append({"step": name, "outcome": outcome, "seconds": seconds})
        print(f"{name}: {outcome}, {seconds:.1f} s", flush=True)
        well &= outcome == "done"
    return well


def git(*asked: str) -> str:
    """What git says of this checkout; empty where there is no git, or no checkout."""
    with contextlib.suppress(OSError):
        done = subprocess.run(["git", *asked], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
    return ""


def commit() -> str | None:
    """The commit of what runs: of this checkout, or the one that `prepare.py` has noted; None where it is not known."""
    found = importlib.util.find_spec("tightfit")
    is_checkout = found is None or found.origin is None or ROOT in Path(found.origin).resolve().parents
    if not is_checkout:  # what runs is the wheel that travelled
        return noted_commit()
    return git("describe", "--always", "--dirty", "--abbrev=40") or noted_commit()


def noted_commit() -> str | None:
    noted = HERE / "carry" / "commit"
    return (noted.read_text(encoding="utf-8").strip() or None) if noted.exists() else None


def this_run(*, is_dry: bool) -> dict[str, Any]:
    """What a later fold, perhaps elsewhere, could not know of this run."""
    settings = {name: os.environ.get(name) for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")}
    try:
        torch_version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch_version = None
    begun = datetime.now(UTC).isoformat(timespec="seconds")
    return {"is_dry": is_dry, "commit": commit(), "date": begun, "torch": torch_version, "allocator": settings}


def has_failed(row: dict[str, Any]) -> bool:
    measured = row.get("measured")
    in_measured = isinstance(measured, dict) and "failed" in measured
    return (
        in_measured or "failed" in row or "error" in row or row.get("passed") is False or bool(row.get("wrong_steps"))
    )


def say_failed(steps: dict[str, Any]) -> bool:
    """Print how many rows failed, step by step. Did any?"""
    counts = {name: sum(map(has_failed, step["rows"])) for name, step in steps.items()}
    for name, count in counts.items():
        if count:
            print(f"{name}: {count} of {len(steps[name]['rows'])} rows failed", flush=True)
    return any(counts.values())


def fold(folder: Path, *, is_dry: bool) -> dict[str, Any]:
    """The lines as one document, by step; of a step that was run again, the last run counts."""
    steps: dict[str, Any] = {}
    runs: list[dict[str, Any]] = []
    is_over: set[str] = set()  # steps whose next line is of another run
    torn = 0
    for record in Lines(folder / "lines.jsonl"):
        if "torn" in record:
            torn += 1
            continue
        if "run" in record:
            runs.append(record["run"])
            is_over |= steps.keys()
            continue
        name = record["step"]
        if name in steps and str(record.get("outcome", "")).startswith("not begun"):
            continue  # what it gave before stays
        if name in is_over or name not in steps:
            steps[name] = {"outcome": "cut off", "seconds": None, "rows": []}
            is_over.discard(name)
        if "outcome" in record:
            steps[name] |= {"outcome": record["outcome"], "seconds": record["seconds"]}
            is_over.add(name)
        else:
            steps[name]["rows"].append({key: value for key, value in record.items() if key != "step"})
    last = runs[-1] if runs else this_run(is_dry=is_dry)
    document = {
        **last, "is_dry": any(each["is_dry"] for each in runs) if runs else is_dry, "torn": torn, "runs": runs,
        "steps": steps,
    }  # fmt: skip
    target = folder / "results.json"
    temporary = target.with_suffix(".json.part")
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    temporary.replace(target)
    return document


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder of results and logs; lines are appended")
    parser.add_argument("--dry-run", action="store_true", help="the same code on the CPU, with tiny shapes")
    parser.add_argument("--steps", default=",".join(LIMITS), help=f"of {', '.join(LIMITS)}")
    parser.add_argument("--seconds", type=float, default=ALL_SECONDS, help="for all steps together")
    parser.add_argument("--step-seconds", type=float, help="for each step, instead of the limit of its own")
    parser.add_argument("--fold", action="store_true", help="run nothing, fold the lines that are there")
    given = parser.parse_args(arguments)
    names = [name for name in given.steps.split(",") if name]
    if unknown := [name for name in names if name not in LIMITS]:
        parser.error(f"unknown step {unknown[0]!r}: use {', '.join(LIMITS)}")
    if not names:
        parser.error(f"--steps names no step: use {', '.join(LIMITS)}")
    well = True
    if given.fold:
        if not any("torn" not in record for record in Lines(given.out / "lines.jsonl")):
            parser.error(f"nothing to fold: {str(given.out)!r} has no lines.jsonl with results")
    else:
        try:
            given.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"cannot make the folder {str(given.out)!r}: {error.strerror}")
        # a run record is written first, so that a run that is cut off is known too
        Lines(given.out / "lines.jsonl").append({"step": "", "run": this_run(is_dry=given.dry_run)})
        well = run(names, given.dry_run, given.out, given.seconds, given.step_seconds)
    document = fold(given.out, is_dry=given.dry_run)
    print(given.out / "results.json")
    well &= not say_failed(document["steps"])
    return 0 if well and all(step["outcome"] == "done" for step in document["steps"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
