"""The command line as a user meets it: exit status, one line on stderr, nothing half-written, the promised JSON."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tightfit.cli.program import main
from tightfit.core import InvalidInput, Plan, format_bytes

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


pytestmark = pytest.mark.usefixtures("short_studies")

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def tightfit(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command line in this process, which has its imports behind it; whole processes are in `test_stdout`."""

    def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(cwd)
        capfd.readouterr()
        status = main(arguments)
        return subprocess.CompletedProcess(arguments, status, *capfd.readouterr())

    return run


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
        pytest.param(
            ("measure", "MODEL", *SMALL, "--budget", "1kB"), 1, "the least that is feasible", marks=pytest.mark.slow
        ),
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
def test_wrong_input(
    tightfit: Command, arguments: tuple[str, ...], status: int, said: str, model: str, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    done = tightfit(*(model if a == "MODEL" else a for a in arguments), cwd=tmp_path)
    # progress, and the banner of HiGHS 1.16, which no option silences: it is on stderr, where it harms nothing
    known = (" ...", "MIT licence terms", "for full details")
    lines = [line for line in done.stderr.splitlines() if not line.endswith(known)]
    assert done.returncode == status, done.stderr
    assert len(lines) == 1, done.stderr
    assert said in lines[0]
    assert done.stdout == ""
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before, "something was left behind"


def test_a_misspelt_model_is_refused_at_once() -> None:
    child = """
import sys
from tightfit.cli import main
commands = ("measure", "plan", "check", "doctor")
codes = [main([command, name]) for command in commands for name in ("gpt3", "no/such/one")]
assert codes == [2] * 8, codes
assert not {"torch", "transformers"} & set(sys.modules), "seconds of imports before the answer"
"""
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("unknown model") == 8


def test_measure_json(tightfit: Command, model: str, tmp_path: Path) -> None:
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


def test_measure_says_when_checkpointing_backfires(tightfit: Command, model: str, tmp_path: Path) -> None:
    done = tightfit("measure", model, "--batch", "1", "--seq", "2", "--budget", "100%", "--repeats", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "backfires" in done.stdout
    assert "no checkpointing" in done.stdout


def test_plan_writes_a_plan_and_explains_it(tightfit: Command, model: str, tmp_path: Path) -> None:
    done = tightfit("plan", model, *SMALL, "--budget", "75%", "--explain", "--method", "lora", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.peak_bytes <= plan.budget_bytes
    for said in ("the peak is at", "why:", "status:", "recompute:", "held for backward", "unit by unit"):
        assert said in done.stdout
    done = tightfit("plan", model, *SMALL, "--budget", "75%", "--json", "--out", "other.json", cwd=tmp_path)
    assert json.loads(done.stdout)["budget_bytes"] == Plan.load(tmp_path / "other.json").budget_bytes


@pytest.mark.slow
def test_doctor(tightfit: Command, tmp_path: Path) -> None:
    done = tightfit("doctor", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["torch"]
    assert done.stderr == ""
    assert "transformers" in tightfit("doctor", cwd=tmp_path).stdout


def test_train_leaves_the_evidence(tightfit: Command, model: str, tmp_path: Path) -> None:
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


# ------------------------------------------------------------------------------------ what a hostile user asked


def said_of(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 2, command_says: bool = False) -> str:
    """The one line of an error. Unless `command_says` what it does, there is nothing else: no work was begun."""
    assert main(arguments) == status
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    if command_says:
        lines = [line for line in lines if not line.endswith(" ...")]
    (line,) = lines
    assert line.startswith("tightfit: ")
    return line


def shaped(folder: Path, **changed: Any) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps({name: value for name, value in {**TINY, **changed}.items() if value != "no"})
    )
    return str(folder)


@pytest.mark.parametrize(
    "command",
    [
        ("plan", "MODEL", *SMALL, "--out", "there"),
        ("plan", "MODEL", *SMALL, "--html", "there"),
        ("plan", "MODEL", *SMALL, "--chrome", "there"),
        ("plan", "MODEL", *SMALL, "--snapshot", "there"),
        ("measure", "MODEL", *SMALL, "--html", "there"),
        ("check", "MODEL", "--html", "there"),
        ("check", "MODEL", "--calibrate", "there"),
        ("report", "run", "--out", "there"),
        ("report", "run", "--markdown", "there"),
        ("report", "run", "--png", "there"),
    ],
)
def test_what_is_no_regular_file_stays(
    command: tuple[str, ...],
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tightfit.report.run_document", lambda _: {})
    Path("run").mkdir()
    os.mkfifo("there")
    line = said_of(capsys, *(model if word == "MODEL" else word for word in command))
    assert "'there'" in line and command[-2] in line
    assert Path("there").is_fifo()


@pytest.mark.parametrize(
    "command",
    [
        ("plan", "MODEL", *SMALL, "--out", "a.json", "--html", "a.json"),
        ("plan", "MODEL", *SMALL, "--html", "plan.json"),
        ("plan", "MODEL", *SMALL, "--chrome", "run/../plan.json"),
        ("plan", "MODEL", *SMALL, "--snapshot", "link.json"),
        ("plan", "MODEL", *SMALL, "--html", "a", "--chrome", "./a"),
        ("report", "run", "--out", "a", "--markdown", "a"),
        ("report", "run", "--png", "run/report.html"),
        ("report", "run", "--markdown", "a", "--png", "a"),
        ("check", "MODEL", "--calibrate", "a", "--html", "a"),
    ],
)
def test_two_outputs_are_two_files(
    command: tuple[str, ...],
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tightfit.report.run_document", lambda _: {})
    Path("run").mkdir()
    Path("link.json").symlink_to("plan.json")
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    line = said_of(capsys, *(model if word == "MODEL" else word for word in command))
    assert "one file" in line and command[-2] in line
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def test_a_plan_goes_where_a_link_points(model: str, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "far" / "plan.json")
    assert main(["plan", model, *SMALL, "--budget", "75%", "--out", str(tmp_path / "link.json")]) == 0
    assert (tmp_path / "link.json").is_symlink()
    assert Plan.load(tmp_path / "far" / "plan.json").choices


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": -2}, "num_hidden_layers is -2"),
        ({"hidden_size": -64}, "hidden_size is -64"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"num_attention_heads": 0}, "a size in it is 0"),
        ({"model_type": "gpt2", "num_hidden_layers": "no", "n_layer": 0}, "num_hidden_layers is 0"),
        ({"hidden_size": 63}, "The hidden size (63) is not a multiple of the number of attention heads (4)"),
        ({"num_hidden_layers": "3"}, "expected int, got str (value: '3')"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "measure", "check"])
def test_a_config_of_no_model_is_refused_with_the_reason(
    command: str,
    changed: dict[str, Any],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = shaped(tmp_path / "wrong", **changed)
    options = ("--no-search",) if command == "check" else ("--batch", "1", "--budget", "100%")
    assert said in said_of(capsys, command, wrong, "--seq", "32", *options, command_says=command == "check")


@pytest.mark.parametrize("command", ["plan", "measure"])
@pytest.mark.parametrize("batch", [1_000_000_000, 10**30])
def test_a_batch_that_no_memory_holds_is_refused(
    command: str, batch: int, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = said_of(capsys, command, model, "--batch", str(batch), "--seq", "64")
    # ids and labels, one hidden state of 64, 300 logits
    assert format_bytes(batch * 64 * (2 * 8 + 4 * 64 + 4 * 300)) in line
    assert format_bytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) in line
    assert "smaller" in line


def test_memory_that_the_machine_does_not_give_is_a_no(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "tightfit.integrations.transformers.random_batch", lambda *_: torch.empty(10**16, dtype=torch.uint8)
    )
    line = said_of(capsys, "plan", model, *SMALL, status=1)
    assert format_bytes(10**16) in line and "--batch" in line and "--debug" not in line


@pytest.mark.parametrize("name", ["", "  "])
@pytest.mark.parametrize("command", ["plan", "measure", "check", "doctor", "train"])
def test_an_empty_name_is_not_this_folder(
    command: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(shaped(tmp_path / "here"))
    assert main([command, *(("--model", name) if command == "train" else (name,))]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if not line.endswith(" ..."))
    said = "--model or model_name_or_path is given, but empty" if command == "train" else "name of the model is empty"
    assert said in line
    assert [entry.name for entry in Path().iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    "command", ["plan", *(pytest.param(each, marks=pytest.mark.slow) for each in ("measure", "train"))]
)
def test_more_than_the_unplanned_peak_is_harmless_and_said(
    command: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = {
        "plan": ("plan", model, *SMALL),
        "measure": ("measure", model, *SMALL, "--repeats", "1"),
        "train": ("train", "--model", model, *SMALL, "--steps", "1", "--compare-steps", "0", "--out", "run"),
    }[command]
    assert main([*wanted, "--budget", "200%", "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    plan = report.get("plan", report)
    assert plan["recompute_flops"] == 0
    assert plan["budget_bytes"] > plan["peak_bytes"]
    assert [line for line in err.splitlines() if "200%" in line and "nothing has to be recomputed" in line]


def test_more_than_all_of_a_device_is_refused(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", model, "--seq", "32", "--budget", "200%"]) == 2
    assert "'200%'" in capsys.readouterr().err
    from tightfit.train import TrainOptions
    from tightfit.train.run import Run

    on_a_gpu: Any = SimpleNamespace(device=torch.device("cuda"), options=TrainOptions(budget="100.1%"))
    with pytest.raises(InvalidInput, match=r"'100.1%' is more than all of the GPU"):
        Run._budget(on_a_gpu)


def test_a_budget_that_nothing_holds_is_an_answer_in_json(tightfit: Command, tmp_path: Path) -> None:
    done = tightfit("plan", "tightfit-demo", "--batch", "1", "--seq", "8", "--budget", "1MB", "--json", cwd=tmp_path)
    answer = json.loads(done.stdout)
    assert done.returncode == 1 and answer["fits"] is False
    assert answer["least_bytes"] > answer["budget_bytes"] == 1_000_000 and answer["advice"]
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------ a guard in CI

_GUARDED = ("--gpu", "24GiB", *SMALL, "--dtype", "fp32", "--no-search", "--json")


def _guard(capsys: pytest.CaptureFixture[str], model: str, *asked: str) -> tuple[int, dict[str, Any]]:
    status = main(["check", model, *_GUARDED, *asked])
    return status, json.loads(capsys.readouterr().out)


def test_a_guard_says_no_by_its_exit_status(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, plain = _guard(capsys, model)
    assert status == 0 and plain["max"] is None
    taken = {mode["mode"]: mode["reserved_bytes"] for mode in plain["modes"]}
    for mode, more, within in (("none", 0, True), ("none", -1, False)):
        status, answer = _guard(capsys, model, "--max", str(taken[mode] + more), "--max-of", mode)
        assert status == (0 if within else 1)
        assert answer["max"] == {
            "max_bytes": taken[mode] + more, "mode": mode, "reserved_bytes": taken[mode], "within": within,
        }  # fmt: skip
    # a plan for the whole card would take more than a guard that a smaller plan keeps
    status, answer = _guard(capsys, model, "--max", str(taken["none"] - 1))
    assert status == 0 and answer["max"]["within"] and answer["max"]["reserved_bytes"] < taken["none"]


@pytest.mark.slow
def test_a_guard_that_no_plan_keeps(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, answer = _guard(capsys, model, "--max", "3MB")
    assert status == 1 and not answer["max"]["within"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--max", "lots"), "expected a size"),
        (("--max", "80%"), "is a percentage"),
        (("--max", "1GiB", "--gpu", "all"), "give it with one --gpu"),
        (("--max", "1GiB", "--budget", "1GiB"), "leave --budget out"),
    ],
)
def test_a_guard_that_cannot_be_meant(
    asked: tuple[str, ...], said: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", model, *SMALL, *asked]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gpu", "60MiB", "--max", "1GiB"], "leaves nothing for tensors"),
        (["--gpu", "24GiB", "--max-of", "none"], "--max-of says whose bytes --max judges: give --max too"),
    ],
)
def test_a_guard_that_guards_nothing_is_refused(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "tightfit-demo", "--no-search", "--seq", "64", *options]) == 2
    assert said in capsys.readouterr().err


def test_advice_is_in_the_command_lines_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", "tightfit-demo", "--batch", "1", "--seq", "16", "--budget", "60%"]
    asked += ["--out", str(tmp_path / "plan.json"), "--json"]
    assert main(asked) == 1
    said = capsys.readouterr()
    assert "beside=" not in said.err + said.out
    (levers,) = re.findall(r"--levers ([a-z_,]+) would take", said.err)
    assert any(levers in advice for advice in json.loads(said.out)["advice"])
    assert main([*asked, "--levers", levers]) == 0
