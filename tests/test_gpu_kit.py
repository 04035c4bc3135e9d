"""The kit for a card (`benchmarks/gpu`), as far as a CPU can run it.

Its steps run here by the same code with tiny shapes. That a step which hangs or dies costs no result is tested with
steps of the test's own, so that it takes no time. No card is needed.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

KIT = Path(__file__).parents[1] / "benchmarks" / "gpu"
RESULTS = KIT.parent / "results"


def kit_module(name: str) -> ModuleType:
    """One that imports nothing of the others."""
    spec = importlib.util.spec_from_file_location(f"gpu_kit_{name}", KIT / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def dry_run(folder: Path, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(KIT / "run.py"), "--out", str(folder), "--dry-run", *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    logs = "".join(log.read_text(encoding="utf-8")[-2000:] for log in sorted(folder.glob("*.log")))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    found: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert found["is_dry"] and not found["torn"]
    return found["steps"]  # type: ignore[no-any-return]


def check_memory(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert "failed" not in row["measured"], row
        assert row["measured"]["reserved_bytes"] is None  # a CPU has no caching allocator, and nothing is guessed
        # torch.utils.checkpoint saves random states, which only tiny steps show
        off = 0.15 if row["mode"] == "every-block" else 0.005
        assert abs(row["off_by"]["allocated_bytes"]) < off, row
        assert row["measured"].get("fallbacks", 0) == 0


def test_steps_run_dry(tmp_path: Path) -> None:
    steps = dry_run(tmp_path, "--steps", "environment,memory-B", "--seconds", "600", "--step-seconds", "300")
    assert [step["outcome"] for step in steps.values()] == ["done", "done"]
    facts, registered = steps["environment"]["rows"][:2]
    assert facts["facts"]["device"] == "cpu" and facts["facts"]["environment"]["torch"]
    assert facts["facts"]["allocator"] == {}  # a card's settings stand here
    assert registered["registered"]["missing"] == []
    rows = steps["memory-B"]["rows"]
    assert [row["mode"] for row in rows] == ["none", "tightfit, least, exact", "tightfit, least, tiles"]
    assert not rows[2]["forecast"]["exact"] and rows[1]["forecast"]["exact"]
    check_memory(rows)


@pytest.mark.slow
def test_every_step_runs_dry(tmp_path: Path) -> None:
    steps = dry_run(tmp_path, "--seconds", "6000", "--step-seconds", "1200")
    assert len(steps) == 14
    for name, step in steps.items():
        assert step["outcome"] == "done" and step["rows"], name
        assert not [row for row in step["rows"] if "failed" in row or "error" in row], (name, step["rows"])
    for row in steps["repeatability"]["rows"]:
        assert row["same_ops"] and not row["not_the_same_twice"] and not row["gradients_differ"]
        assert row["backward_ops_seen"] > 0
    for row in (*steps["gradients"]["rows"], *steps["nf4"]["rows"][1:]):
        assert row["checks"]["gradients"]["passed"], row
    for table in "ABCS":
        check_memory(steps[f"memory-{table}"]["rows"])
    (race,) = [row for row in steps["offload"]["rows"] if "wrong_steps" in row]
    assert race["wrong_steps"] == [] and race["gradients"] > 0
    assert steps["offload"]["rows"][0]["offloaded_bytes"] > 0
    peaks = {row["way"]: row["allocated_bytes"] for row in steps["time"]["rows"]}
    for peer in ("every-block", "selective"):
        assert peaks[f"tightfit at {peer}'s peak"] <= peaks[peer] * 1.005
    proof = steps["compiled"]["rows"][-1]
    assert proof["way"] == "proof" and proof["passed"], str(proof)


NOTICES = """
import sys
sys.path[:0] = sys.argv[1:]
from pathlib import Path
import torch, steps
from card import Card
from torch import nn
from tightfit.engine.offload import Parcel

class Counts(nn.Module):
    # not the same twice: a number that grows with each call scales what comes out of one op
    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(8, 8), [0]

    def forward(self, x):
        self.calls[0] += 1
        return (torch.relu(self.layer(x)) * self.calls[0]).sum()

found = steps._two_runs(Counts(), torch.randn(4, 8))
assert found["not_the_same_twice"] == {"aten.mul.Tensor": 2}, found  # in forward and in backward
assert found["gradients_differ"] == 2, found

fetch, fetched = Parcel.fetch, [0]
def late(parcel):
    # a copy that is used before it has arrived, once
    fetched[0] += 1
    fresh = fetch(parcel)
    return fresh.zero_() if fetched[0] == 100 else fresh
Parcel.fetch, race_of = late, steps._race
def counted(*args, **kwargs):
    fetched[0] = 0  # what was fetched before is not compared with anything
    return race_of(*args, **kwargs)
steps._race = counted
(race,) = [row for row in steps.offload(Card(is_dry=True, folder=Path("."))) if "wrong_steps" in row]
assert fetched[0] > 100 and len(race["wrong_steps"]) == 1, (fetched, race)
"""


@pytest.mark.slow
def test_the_kit_notices_what_it_looks_for() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NOTICES, str(KIT), str(KIT.parent)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


STEPS = """
import os, subprocess, sys, time

def well(card):
    yield {"n": 1}
    yield {"n": 2}

def hangs(card):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield {"child": child.pid}
    time.sleep(600)

def dies(card):
    yield {"n": 1}
    os.abort()

def raises(card):
    yield {"n": 1}
    raise ValueError("of the step's own")

STEPS = {"well": well, "hangs": hangs, "dies": dies, "raises": raises, "after": well}
"""


def runs(process: int) -> bool:
    """Does the process still run? One that has ended may wait to be asked for its status."""
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"


def test_a_step_that_hangs_or_dies_costs_only_itself(tmp_path: Path) -> None:
    shutil.copy(KIT / "run.py", tmp_path)
    (tmp_path / "steps.py").write_text(STEPS, encoding="utf-8")
    (tmp_path / "card.py").write_text(
        "class Card:\n    def __init__(self, *, is_dry, folder): pass\n", encoding="utf-8"
    )
    main = tmp_path / "main.py"
    main.write_text(
        "import sys, run\nif __name__ == '__main__':\n    run.PRELOADED = []\n"
        "    run.LIMITS, run.MOST_TIMES = {'well': 60, 'hangs': 2, 'dies': 60, 'raises': 60, 'after': 60}, 1\n"
        "    sys.exit(run.main(['--out', 'out', '--dry-run']))\n",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, str(main)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    steps = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["steps"]
    assert list(steps) == ["well", "hangs", "dies", "raises", "after"]
    assert [step["outcome"] for step in steps.values()] == [
        "done", "ended after its 2 seconds", "failed with exit status -6", "failed with exit status 1", "done",
    ]  # fmt: skip
    assert [row["n"] for row in steps["well"]["rows"]] == [1, 2]
    assert [row["n"] for row in steps["dies"]["rows"]] == [1]
    assert steps["raises"]["rows"][1]["error"] == "ValueError: of the step's own"
    assert not runs(steps["hangs"]["rows"][0]["child"])  # what a step has started ends with it


def test_no_step_can_take_the_time_of_another() -> None:
    run = kit_module("run")
    names = list(run.LIMITS)
    assert sum(run.LIMITS.values()) + run.START_SECONDS <= run.ALL_SECONDS <= 360
    for hangs in (set(), {"gradients"}, {"compiled", "memory-A"}, set(names)):
        left = run.ALL_SECONDS - run.START_SECONDS
        for turn, name in enumerate(names):
            limit = run.limit_of(name, names[turn + 1 :], left)
            assert run.LIMITS[name] <= limit <= left, (hangs, name)
            if name != names[-1]:
                assert limit <= run.MOST_TIMES * run.LIMITS[name]
            left -= limit if name in hangs else 1
    # what was given up by quick steps is there for slow ones
    assert run.limit_of("memory-D", ["compiled"], 200) == run.MOST_TIMES * run.LIMITS["memory-D"]
    assert run.limit_of("compiled", [], 200) == 200
    # where all of them begin late, the first are served
    assert run.limit_of("environment", names[1:], run.ALL_SECONDS - 100) == run.LIMITS["environment"]
    for uses in ("time", "offload", "compiled"):
        assert names.index("calibration") < names.index(uses)


def test_later_steps_reckon_with_what_was_calibrated(tmp_path: Path) -> None:
    shutil.copy(KIT / "run.py", tmp_path)
    (tmp_path / "steps.py").write_text(
        "import os, run\nfrom pathlib import Path\n"
        "def calibration(card):\n    yield {'file': os.environ['TIGHTFIT_CALIBRATION']}\n"
        "    run.device_file(Path('out'), is_dry=True).write_text('{}')\n"
        "def time(card):\n    yield {'file': os.environ['TIGHTFIT_CALIBRATION']}\n"
        "STEPS = {'calibration': calibration, 'time': time}\n",
        encoding="utf-8",
    )
    (tmp_path / "card.py").write_text(
        "class Card:\n    def __init__(self, *, is_dry, folder): pass\n", encoding="utf-8"
    )
    main = tmp_path / "main.py"
    main.write_text(
        "import sys, run\nif __name__ == '__main__':\n    run.PRELOADED = []\n"
        "    sys.exit(run.main(['--out', 'out', '--dry-run', '--steps', 'calibration,time']))\n",
        encoding="utf-8",
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "device.json").write_text("{}")  # a card's: a dry run is not for it
    (tmp_path / "out" / "dry-device.json").write_text("{}")  # of a run before
    done = subprocess.run([sys.executable, str(main)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    steps = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["steps"]
    assert [steps[name]["rows"][0]["file"] for name in ("calibration", "time")] == ["none", "out/dry-device.json"]


def test_a_run_says_its_commit_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = kit_module("run")
    assert run.commit() is not None
    for name in ("HERE", "ROOT"):
        monkeypatch.setattr(run, name, tmp_path)  # no checkout, and what runs is not in it
    assert run.commit() is None
    (tmp_path / "carry").mkdir()
    (tmp_path / "carry" / "commit").write_text("c0ffee\n", encoding="utf-8")
    assert run.commit() == "c0ffee" == run.this_run(is_dry=False)["commit"]
    (tmp_path / "carry" / "commit").write_text("\n", encoding="utf-8")  # prepared where there was no git
    assert run.commit() is None
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda _: None)  # the checkout itself, copied without git
    assert run.commit() is None
    (tmp_path / "carry" / "commit").write_text("c0ffee\n", encoding="utf-8")
    assert run.commit() == "c0ffee"
    monkeypatch.setenv("PATH", str(tmp_path))  # a machine that has no git
    assert run.commit() == "c0ffee" and run.git("log") == ""


def test_a_wheel_has_not_the_commit_of_the_checkout_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = kit_module("run")
    monkeypatch.setattr(run, "HERE", tmp_path)  # nothing was noted
    spec = importlib.util.spec_from_file_location("tightfit", tmp_path / "tightfit" / "__init__.py")
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda _: spec)
    assert run.commit() is None


def test_a_step_ends_with_the_kit(tmp_path: Path) -> None:
    shutil.copy(KIT / "run.py", tmp_path)
    (tmp_path / "steps.py").write_text(
        STEPS.replace('"child": child.pid', '"step_id": os.getpid(), "child": child.pid')
    )
    (tmp_path / "card.py").write_text(
        "class Card:\n    def __init__(self, *, is_dry, folder): pass\n", encoding="utf-8"
    )
    main = tmp_path / "main.py"
    main.write_text(
        "import sys, run\nif __name__ == '__main__':\n    run.PRELOADED = []\n    run.LIMITS = {'hangs': 60}\n"
        "    sys.exit(run.main(['--out', 'out', '--dry-run']))\n",
        encoding="utf-8",
    )
    kit = subprocess.Popen([sys.executable, str(main)], cwd=tmp_path)
    rows: list[dict[str, Any]] = []
    until = time.monotonic() + 30
    while not rows and time.monotonic() < until:
        time.sleep(0.1)
        rows = [row for row in kit_module("run").Lines(tmp_path / "out" / "lines.jsonl") if "step_id" in row]
    kit.kill()
    kit.wait()
    while any(runs(rows[0][key]) for key in ("step_id", "child")) and time.monotonic() < until:
        time.sleep(0.1)
    assert not runs(rows[0]["step_id"]) and not runs(rows[0]["child"])


def test_a_line_that_was_cut_off_loses_no_other(tmp_path: Path) -> None:
    run = kit_module("run")
    lines = run.Lines(tmp_path / "lines.jsonl")
    lines.append({"step": "memory-A", "case": "A-1024"})
    lines.append({"step": "memory-A", "case": "A-2048"})
    with (tmp_path / "lines.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": "memory-A", "case": "A-40')
    document = run.fold(tmp_path, is_dry=False)
    assert document["torn"] == 1
    assert [row["case"] for row in document["steps"]["memory-A"]["rows"]] == ["A-1024", "A-2048"]
    assert document["steps"]["memory-A"]["outcome"] == "cut off"
    lines.append({"step": "memory-A", "case": "A-8192"})  # a second call goes on behind the torn line
    assert [row["case"] for row in run.fold(tmp_path, is_dry=False)["steps"]["memory-A"]["rows"]][-1] == "A-8192"


def wheel(folder: Path, name: str, size: int) -> Path:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        said = "Metadata-Version: 2.1\nRequires-Dist: numpy\nRequires-Dist: pytest; extra == 'test'\n"
        archive.writestr(f"{name}-1.0.dist-info/METADATA", said)
        archive.writestr("data", b"x" * size)
    return path


def test_what_travels_stays_within_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = kit_module("prepare")
    sizes = {"highspy": 1000, "bitsandbytes": 100_000}
    monkeypatch.setattr(prepare, "own", lambda folder: wheel(folder, "tightfit", 10))
    monkeypatch.setattr(prepare, "download", lambda package, folder: wheel(folder, package, sizes[package]))
    carry = tmp_path / "carry"
    assert prepare.gather(["highspy"], ["bitsandbytes"], carry, 1 << 20) == []
    assert len(list(carry.glob("*.whl"))) == 3
    assert prepare.gather(["highspy"], ["bitsandbytes"], carry, 50_000) == ["bitsandbytes"]
    assert [each.name.split("-")[0] for each in sorted(carry.glob("*.whl"))] == ["highspy", "tightfit"]
    assert (carry / "commit").exists()
    assert prepare.needs(next(carry.glob("highspy*"))) == ["numpy"]
    with pytest.raises(SystemExit, match="with highspy it is more than"):
        prepare.gather(["highspy"], [], carry, 500)


def test_every_registered_plan_is_the_one_that_was_forecast() -> None:
    tables = json.loads((RESULTS / "gpu_predictions.json").read_text(encoding="utf-8"))
    said = {
        (row["case"], mode): forecast
        for table in tables.values()
        for row in table["rows"]
        for mode, forecast in row["modes"].items()
    }
    with zipfile.ZipFile(RESULTS / "gpu_plans.zip") as archive:
        for name in archive.namelist():
            case, mode = name.removesuffix(".json").split("/", 1)
            plan = json.loads(archive.read(name))
            plan = plan.get("plan", plan)
            assert said[case, mode]["peak_bytes"] == plan["peak_bytes"], name
    for row in tables["D"]["rows"]:
        for mode, forecast in row["modes"].items():  # under the cap that the kit sets
            assert forecast.get("reserved_bytes", 0) <= row["room_bytes"], (row["case"], mode)
            assert "reserved_bytes" in forecast or "registered" in forecast  # of before, without the cap: it says so
    for table in tables.values():
        assert table["date"] and table["commit"] and table["card"] and table["environment"]["torch"]


def test_the_page_tells_a_card_from_a_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("docs_generate_gpu", KIT.parents[1] / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, generate)  # its dataclasses ask for it
    spec.loader.exec_module(generate)
    shutil.copy(RESULTS / "gpu_predictions.json", tmp_path)
    monkeypatch.setattr(generate, "RESULTS", tmp_path)
    assert "No card has run tightfit yet" in generate.gpu_page() and "No GPU has run" in generate.evidence()
    assert generate.kit_part().count("| not run |") == len(kit_module("run").LIMITS)
    forecast = {"allocated_bytes": 10**10, "reserved_bytes": 2 * 10**10}
    measured: dict[str, Any] = {
        "date": "2026-12-01T00:00:00", "commit": "c0ffee", "is_dry": True,
        "steps": {
            "environment": {"rows": [{"facts": {"name": "A card", "environment": {"torch": "2.11.0+cu130"}}}]},
            "memory-B": {
                "outcome": "ended after its 25 seconds",
                "rows": [
                    {
                        "case": "B-lora", "mode": "none", "forecast": forecast,
                        "measured": {"allocated_bytes": 8 * 10**9, "reserved_bytes": 2 * 10**10},
                        "off_by": {"allocated_bytes": 0.25, "reserved_bytes": 0.0},
                    },
                    {"case": "B-nf4", "mode": "none", "forecast": forecast, "measured": {"failed": "OutOfMemoryError"}},
                ]
            },
        },
    }  # fmt: skip
    file = tmp_path / "gpu_measured.json"
    file.write_text(json.dumps(measured), encoding="utf-8")
    with pytest.raises(SystemExit, match="a dry run is no measurement"):
        generate.gpu_page()
    file.write_text(json.dumps({**measured, "is_dry": False}), encoding="utf-8")
    page = generate.gpu_page()
    assert "One card has run tightfit: A card, on 2026-12-01, with torch 2.11.0+cu130, at commit c0ffee." in page
    assert "No card" not in page and "No GPU has run" not in generate.evidence()
    assert "| ended after its 25 seconds; 1 of 2 rows failed |" in page and "| not run |" in page
    assert "| B-lora | no checkpointing | 10.00 GB / 20.00 GB | 8.00 GB / 20.00 GB | +25.0% / +0.0% |" in page
    assert "| B-nf4 | no checkpointing | | OutOfMemoryError | |" in page
    steps = measured["steps"]
    steps["environment"] = {"rows": [{"error": "OutOfMemoryError"}]}  # a run that was cut or failed
    steps["memory-B"]["rows"] += [{"error": "cut"}, {**steps["memory-B"]["rows"][0], "measured": {"failed": "again"}}]
    file.write_text(json.dumps({**measured, "is_dry": False}), encoding="utf-8")
    page = generate.gpu_page()
    assert "its name was not recorded" in page and page.count("| B-lora | no checkpointing | | again | |") == 1
    assert "8.00 GB / 20.00 GB" not in page


def test_failed_rows_are_said_and_a_fold_knows_its_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = kit_module("run")
    lines = run.Lines(tmp_path / "lines.jsonl")
    lines.append({"step": "", "run": {**run.this_run(is_dry=True), "commit": "c0ffee"}})
    for row in ({"failed": "x"}, {"passed": False}, {"wrong_steps": [3]}, {"measured": {"failed": "x"}}, {"n": 1}):
        lines.append({"step": "offload", **row})
    lines.append({"step": "offload", "outcome": "done", "seconds": 1.0})
    with (tmp_path / "lines.jsonl").open("a", encoding="utf-8") as file:
        file.write("[]\n")
    assert run.main(["--out", str(tmp_path), "--fold"]) == 1
    assert "offload: 4 of 5 rows failed" in capsys.readouterr().out
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert found["is_dry"] and found["commit"] == "c0ffee" and "PYTORCH_ALLOC_CONF" in found["allocator"]
    lines.append({"step": "offload", "n": 2})  # run again: the last run counts
    lines.append({"step": "offload", "outcome": "done", "seconds": 1.0})
    assert run.main(["--out", str(tmp_path), "--fold"]) == 0


@pytest.mark.parametrize(
    "arguments", [["--out", "no", "--fold"], ["--out", "no", "--steps", ""], ["--out", "/dev/null/x"]]
)
def test_wrong_input_makes_nothing(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as refused:
        kit_module("run").main(arguments)
    assert refused.value.code == 2 and not list(tmp_path.iterdir())
