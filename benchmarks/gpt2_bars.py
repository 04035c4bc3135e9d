"""GPT-2 of 124 million parameters, trained in full: the whole step at budgets that no plan of activations can hold.

    python benchmarks/gpt2_bars.py               # some minutes; writes benchmarks/results/gpt2_bars.json
    python benchmarks/gpt2_bars.py --only train  # one of the parts, the others as they were

Random weights, dropout on, AdamW, and ten batches of the text that the demo trains on, a byte a token. On the CPU.

`share`: 2 x 320 tokens at 60 % of the plain step's peak. `device`: 1 x 64 tokens at the lowest peak that is reached
with the optimizer's state on the device. `host`: the same with the state in host memory. Of each: the predicted peak,
the highest of ten steps by the allocator's count, and whether losses, weights and optimizer state of the ten steps are
bit for bit those of steps without a plan.

`train`: the model is saved in a folder, and `tightfit train` fine-tunes it at half of the plain peak. Plans of
activations alone are refused that budget. One run is killed (SIGKILL) between two checkpoints and resumed; its losses
are compared with those of steps without a plan.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import drawn

os.environ.setdefault("KINETO_LOG_LEVEL", "6")

import torch
import transformers
from torch import nn

import tightfit
from tightfit.core import Category, Plan
from tightfit.integrations.transformers import load_model
from tightfit.plan import Effort, lowest
from tightfit.step.environment import environment
from tightfit.train import byte_tokenizer
from tightfit.verify.measure import BESIDE
from tightfit.verify.peak import PeakMeter, static_bytes

RESULTS = Path(__file__).parent / "results" / "gpt2_bars.json"
MODEL = "gpt2"
STEPS = 10
EFFORT = Effort(points=20, solver_seconds=2.0, proves=False)
ACTIVATIONS = "recompute,loss_in_place,nest"
ON_DEVICE = f"{ACTIVATIONS},optimizer_chunks,step_in_backward"
IN_HOST = f"{ON_DEVICE},state_in_host"


def batches(rows: int, length: int) -> list[dict[str, torch.Tensor]]:
    text = "\n\n".join(topics[topic] for topic in sorted(topics))
    ids = torch.tensor(byte_tokenizer()(text[: 2 * STEPS * rows * length])["input_ids"])
    cut = ids[: STEPS * rows * length].view(STEPS, rows, length)
    return [{"input_ids": each, "labels": each} for each in cut]


def made() -> tuple[nn.Module, torch.optim.Optimizer]:
    model: Any = load_model(MODEL, seed=0)[0]
    return model, torch.optim.AdamW(model.parameters(), 2e-5)


def digests(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """Of the bits of every weight and of all that the optimizer keeps."""
    found = {f"weight {name}": p.detach() for name, p in model.named_parameters()}
    for place, kept in optimizer.state_dict()["state"].items():
        found |= {f"state {place} {name}": value for name, value in kept.items()}
    return {name: hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest() for name, value in found.items()}


def ten_steps(plan: Plan | None, rows: int, length: int) -> dict[str, Any]:
    """From the same start: losses, digests and the highest peak."""
    model, optimizer = made()
    torch.manual_seed(1)
    losses, peaks, seconds = [], [], []
    with contextlib.nullcontext() if plan is None else tightfit.apply(model, plan, optimizer=optimizer):
        for batch in batches(rows, length):
            gc.collect()  # what is freed in a step and was made before it would not be counted
            before_bytes = static_bytes(model, optimizer, batch)
            started = time.perf_counter()
            with PeakMeter("cpu") as meter:
                loss = model(**batch).loss
                loss.backward()
                losses.append(loss.item())
                del loss
                optimizer.step()
                optimizer.zero_grad()
            seconds.append(time.perf_counter() - started)
            peaks.append(before_bytes + meter.rise_bytes)
    return {
        "losses": losses, "digests": digests(model, optimizer), "peak_bytes": max(peaks),
        "step_seconds": sorted(seconds)[STEPS // 2],
    }  # fmt: skip


def compared(part: str, rows: int, length: int, planned: Callable[[tightfit.Trace], Plan]) -> dict[str, Any]:
    model, optimizer = made()
    trace = tightfit.trace(model, batches(rows, length)[0], optimizer=optimizer, tiles=False)
    tied: Any = model.get_input_embeddings().weight  # type: ignore[operator]
    del model, optimizer
    gc.collect()
    started = time.perf_counter()
    plan = planned(trace)
    planning_seconds = time.perf_counter() - started
    plain, found = ten_steps(None, rows, length), ten_steps(plan, rows, length)
    static = {name.value: trace.static_bytes[name.value] for name in (Category.PARAMETERS, Category.OPTIMIZER_STATE)}
    return {
        "part": part, "batch": rows, "seq": length, "budget_bytes": plan.budget_bytes,
        "levers": sorted(plan.settings) + (["recompute"] if plan.replays else []),
        "parameters_bytes": static[Category.PARAMETERS.value],
        "optimizer_state_bytes": static[Category.OPTIMIZER_STATE.value],
        "tied_gradient_bytes": tied.numel() * tied.element_size(),
        "plain_peak_bytes": plain["peak_bytes"], "predicted_peak_bytes": plan.peak_bytes,
        "peak_bytes": found["peak_bytes"], "off": round(found["peak_bytes"] / plan.peak_bytes - 1, 6),
        "peak_owner": tightfit.simulate(trace, plan).peak_owner,
        "of_plain": round(found["peak_bytes"] / plain["peak_bytes"], 4),
        "of_weights_and_state": round(found["peak_bytes"] / sum(static.values()), 4),
        "losses": found["losses"], "losses_identical": plain["losses"] == found["losses"],
        "weights_and_state_identical": plain["digests"] == found["digests"], "tensors": len(plain["digests"]),
        "plain_step_seconds": round(plain["step_seconds"], 2), "step_seconds": round(found["step_seconds"], 2),
        "planning_seconds": round(planning_seconds, 1),
    }  # fmt: skip


def share() -> dict[str, Any]:
    return compared("share", 2, 320, lambda trace: tightfit.plan(trace, "60%", beside=BESIDE, effort=EFFORT))


def device() -> dict[str, Any]:
    return compared("device", 1, 64, lambda trace: lowest(trace, levers=ON_DEVICE, effort=EFFORT))


def host() -> dict[str, Any]:
    return compared("host", 1, 64, lambda trace: lowest(trace, levers=IN_HOST, effort=EFFORT))


# ------------------------------------------------------------------------------------------ tightfit train


def train() -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="tightfit-gpt2-") as scratch:
        folder = Path(scratch)
        model, _ = made()
        model.save_pretrained(folder / "gpt2")  # type: ignore[operator]
        del model
        plain = _record(_run(folder, "plain", "--budget", "100%", "--compare-steps", str(STEPS)))
        budget = str(plain["observed"]["unplanned_peak_bytes"] // 2)
        refused = _run(folder, "refused", "--budget", budget, "--levers", ACTIVATIONS, waits=False)
        _, said = refused.communicate()
        asked = ("--budget", budget, "--levers", IN_HOST)
        killed = _run(folder, "killed", *asked, waits=False)
        _kill_after(killed, folder / "killed" / "losses.jsonl", 6)
        resumed = _record(_run(folder, "killed", *asked, "--resume"))
        losses = [json.loads(line)["loss"] for line in (folder / "killed" / "losses.jsonl").read_text().splitlines()]
        return {
            "part": "train", "batch": 1, "seq": 64, "steps": STEPS, "weights": plain["model"]["origin"],
            "budget_bytes": int(budget), "plain_peak_bytes": plain["observed"]["unplanned_peak_bytes"],
            "of_plain": round(resumed["observed"]["peak_bytes"] / plain["observed"]["unplanned_peak_bytes"], 4),
            "activations_alone": {"exit": refused.returncode, "said": said.decode().strip().splitlines()[-1]},
            "killed_with": signal.Signals(-killed.returncode).name, "resumed_at": resumed["observed"]["resumed_at"],
            "peak_bytes": resumed["observed"]["peak_bytes"], "status": resumed["status"],
            "host_bytes": resumed["observed"]["host_bytes"], "losses": losses,
            "losses_identical": losses == plain["observed"]["compared_losses"] and len(losses) == STEPS,
        }  # fmt: skip


def _run(folder: Path, name: str, *more: str, waits: bool = True) -> Any:
    """`tightfit train` into the folder `name`, which is returned once the run is over; else its process."""
    command = [
        sys.executable, "-m", "tightfit", "train", "--model", str(folder / "gpt2"), "--batch", "1", "--seq", "64",
        "--steps", str(STEPS), "--seed", "0", "--out", str(folder / name), "--save_steps", "4", "--max_grad_norm", "0",
        *more, *(() if "--compare-steps" in more else ("--compare-steps", "0")),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE if not waits else None)
    if not waits:
        return process
    if process.wait():
        raise SystemExit(f"tightfit train ended with {process.returncode}: {' '.join(command)}")
    return folder / name


def _kill_after(process: Any, losses: Path, steps: int) -> None:
    """Kill the run when it has written the losses of so many steps."""
    while process.poll() is None and not (losses.is_file() and losses.read_bytes().count(b"\n") >= steps):
        time.sleep(0.05)
    process.kill()
    process.communicate()


def _record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    return found


PARTS: dict[str, Callable[[], dict[str, Any]]] = {"share": share, "device": device, "host": host, "train": train}


def rows(names: list[str]) -> Iterator[dict[str, Any]]:
    for name in names:
        row = PARTS[name]()
        print(json.dumps(row), flush=True)
        yield row


def main() -> int:
    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="this part alone")
    asked = parser.parse_args()
    names = [asked.only] if asked.only else list(PARTS)
    found = [*drawn.rows_of_others(RESULTS, "part", names), *rows(names)]
    found.sort(key=lambda row: list(PARTS).index(row["part"]))
    document = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "environment": environment(), "rows": found,
    }  # fmt: skip
    drawn.write(RESULTS, document, parts=names)
    return 0


if __name__ == "__main__":
    sys.exit(main())
