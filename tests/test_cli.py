"""The command line as a user meets it: exit status, one line on stderr, nothing half-written, the promised JSON."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tightfit.core import Plan

TINY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
    "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(TINY))
    return str(folder)


def tightfit(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tightfit.cli", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


SMALL = ("--batch", "2", "--seq", "64")


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("measure", "gpt3"), 2, "unknown model 'gpt3'"),
        (("plan", "no/such/folder/anywhere"), 2, "unknown model"),
        (("plan", "MODEL", *SMALL, "--budget", "lots"), 2, "lots"),
        (("plan", "MODEL", *SMALL, "--budget=-1GiB"), 2, "-1GiB"),
        (("plan", "MODEL", *SMALL, "--budget", "0"), 2, "more than zero"),
        (("plan", "MODEL", *SMALL, "--budget", "5%"), 1, "the least that is feasible"),
        (("measure", "MODEL", *SMALL, "--budget", "1kB"), 1, "the least that is feasible"),
        (("plan", "MODEL", "--batch", "0"), 2, "--batch"),
        (("plan", "MODEL", "--seq", "1"), 2, "--seq"),
        (("plan", "MODEL", "--seq", "4096"), 2, "positions"),
        (("plan", "MODEL", *SMALL, "--dtype", "fp4"), 2, "fp4"),
        (("plan", "MODEL", *SMALL, "--device", "tpu"), 2, "tpu"),
        (("plan", "MODEL", *SMALL, "--method", "magic"), 2, "magic"),
        (("plan", "MODEL", *SMALL, "--optimizer", "magic"), 2, "magic"),
        (("plan", "MODEL", *SMALL, "--out", "no/folder/plan.json"), 2, "cannot write"),
        (("train", "--model", "MODEL", "--data", "missing.txt"), 2, "missing.txt"),
        (("train", "--model", "MODEL", "--out", "full"), 2, "not empty"),
        (("train", "--steps", "0"), 2, "--steps"),
        (("train", "--budget", "much"), 2, "much"),
        (("frobnicate",), 2, "frobnicate"),
        (("plan",), 2, "MODEL"),
    ],
)
def test_wrong_input(arguments: tuple[str, ...], status: int, said: str, model: str, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    done = tightfit(*(model if a == "MODEL" else a for a in arguments), cwd=tmp_path)
    lines = [line for line in done.stderr.splitlines() if not line.endswith(" ...")]
    assert done.returncode == status, done.stderr
    assert len(lines) == 1, done.stderr
    assert said in lines[0]
    assert done.stdout == ""
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before, "something was left behind"


def test_measure_json(model: str, tmp_path: Path) -> None:
    done = tightfit("measure", model, *SMALL, "--budget", "75%", "--repeats", "1", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert set(found) == {
        "model", "method", "batch", "seq", "dtype", "device", "environment", "rows", "budget_bytes", "plan", "note",
    }  # fmt: skip
    assert [row["mode"] for row in found["rows"]] == ["none", "every-block", "tightfit"]
    assert [row["gradients"] for row in found["rows"]] == ["reference", "identical", "identical"]
    for row in found["rows"]:
        assert set(row) == {
            "mode", "peak_bytes", "predicted_peak_bytes", "activation_peak_bytes", "step_seconds", "recompute_flops",
            "forward_flops", "gradients",
        }  # fmt: skip
        assert row["peak_bytes"] == pytest.approx(row["predicted_peak_bytes"], rel=0.005)
        assert 0 < row["activation_peak_bytes"] < row["peak_bytes"]
    none, every_block, fitted = found["rows"]
    assert none["recompute_flops"] == 0
    assert fitted["recompute_flops"] == found["plan"]["recompute_flops"] < every_block["recompute_flops"]
    assert fitted["peak_bytes"] <= found["budget_bytes"] * 1.005
    assert "get_memory_footprint" in found["note"]


def test_measure_says_when_checkpointing_backfires(model: str, tmp_path: Path) -> None:
    done = tightfit("measure", model, "--batch", "1", "--seq", "2", "--budget", "100%", "--repeats", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "backfires" in done.stdout
    assert "no checkpointing" in done.stdout


def test_plan_writes_a_plan_and_explains_it(model: str, tmp_path: Path) -> None:
    done = tightfit("plan", model, *SMALL, "--budget", "75%", "--explain", "--method", "lora", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.peak_bytes <= plan.budget_bytes
    for said in ("the peak is at", "why:", "status:", "recompute:", "held for backward", "unit by unit"):
        assert said in done.stdout
    done = tightfit("plan", model, *SMALL, "--budget", "75%", "--json", "--out", "other.json", cwd=tmp_path)
    assert json.loads(done.stdout)["budget_bytes"] == Plan.load(tmp_path / "other.json").budget_bytes


def test_doctor(tmp_path: Path) -> None:
    done = tightfit("doctor", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["torch"]
    assert done.stderr == ""
    assert "transformers" in tightfit("doctor", cwd=tmp_path).stdout


def test_train_leaves_the_evidence(model: str, tmp_path: Path) -> None:
    data = tmp_path / "text.txt"
    data.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    arguments = (
        "train",
        "--model",
        model,
        "--data",
        str(data),
        "--batch",
        "4",
        "--seq",
        "64",
        "--steps",
        "6",
        "--json",
    )
    done = tightfit(*arguments, "--budget", "75%", "--compare-steps", "3", "--lr", "1e-3", "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["losses_identical"] is True
    assert report["passed"] is True
    assert report["peak_bytes"] <= report["plan"]["budget_bytes"] * 1.005
    assert report["peak_bytes"] == pytest.approx(report["plan"]["peak_bytes"], rel=0.005)
    run = tmp_path / "run"
    record = json.loads((run / "record.json").read_text())
    assert record["status"] == "completed"
    assert record["data"]["sha256"]
    assert record["environment"]["torch"]
    assert record["constraint"]["budget_bytes"] == Plan.load(run / "plan.json").budget_bytes
    losses = [json.loads(line)["loss"] for line in (run / "losses.jsonl").read_text().splitlines()]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert (run / "model" / "model.safetensors").is_file()
    again = tightfit(*arguments, "--out", "run", cwd=tmp_path)
    assert again.returncode == 2
    assert json.loads((run / "record.json").read_text()) == record


def test_ctrl_c_leaves_a_readable_record(model: str, tmp_path: Path) -> None:
    data = tmp_path / "text.txt"
    data.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    process = subprocess.Popen(
        [sys.executable, "-m", "tightfit.cli", "train", "--model", model, "--data", str(data), "--batch", "4", "--seq",
         "64", "--steps", "100000", "--budget", "80%", "--compare-steps", "1", "--out", "run"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # a shell that runs the tests in the background has them, and so this process, ignore the interrupt
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - nothing else runs here
    )  # fmt: skip
    losses = tmp_path / "run" / "losses.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (losses.exists() and losses.read_text().count("\n") > 3):
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["status"] == "interrupted"
    assert record["observed"]["steps"] >= 3
    assert "interrupted" in out
