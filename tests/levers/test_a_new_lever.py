"""A lever is one room: with one new file and one line of the registry it is planned, walked, applied, proven, told.

The package is copied, the toy lever is put into the copy, and everything runs there in a process of its own. The toy
does away with a large temporary that a model makes outside its units, by a switch that the model has.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import tightfit
from tightfit.core import Plan, PlanMismatch

SOURCE = Path(tightfit.__file__).parent

REGISTRY_LINE = '    FRUGAL = "frugal"  # the model makes no temporary beside its blocks\n'

ROOM = '''
"""Frugal: the model leaves a temporary out that its result does not need."""

from __future__ import annotations

import contextlib
import dataclasses

from tightfit.core import Lever
from tightfit.levers.interface import LeverDefinition, Share

OP = "aten.repeat.default"


def frugal(trace):
    gone = {value for op in trace.ops if op.name == OP for value in op.outputs if value not in op.inputs}
    values = [dataclasses.replace(v, size_bytes=0) if v.id in gone else v for v in trace.values]
    return dataclasses.replace(trace, values=tuple(values))


class Frugal(LeverDefinition):
    lever = Lever.FRUGAL
    noun = "frugality"
    summary = "the model makes no temporary beside its blocks"

    def recorded(self, step, trace, seen):
        found = any(op.name == OP and op.unit is None for op in trace.ops)
        return dataclasses.replace(trace, notes=(*trace.notes, "frugal: possible")) if found else trace

    def variants(self, step):
        if "frugal: possible" in step.trace.notes:
            yield step.with_setting(self, frugal(step.trace), "on", seconds=1e-9)

    def under(self, trace, plan):
        return frugal(trace) if self.is_used(plan) else trace

    def is_used(self, plan):
        return "frugal" in plan.settings

    @contextlib.contextmanager
    def in_force(self, model, plan, given):
        type(model).frugal = True  # of the class: a proof puts attributes back between steps
        try:
            yield
        finally:
            type(model).frugal = False

    def share(self, walked):
        if not self.is_used(walked.plan):
            return None
        without = walked.walk(dataclasses.replace(walked.plan, settings={}))
        bought = without.peak_bytes - walked.line.peak_bytes
        return Share(lever=self.lever, bought_bytes=bought, seconds=1e-9, flops=0, what=self.summary)

    def how(self, plan):
        return "with the frugal model"

    def said(self, plan):
        return "frugal: the temporary is left out"

    def fact(self, plan):
        return "frugal", plan.settings.get("frugal", "no")


DEFINITION = Frugal()
'''

SCRIPT = """
import io, json, sys
import torch
from rich.console import Console
from torch import nn
import tightfit
from tightfit.core import parse_levers
from tightfit.plan.shares import shares
from tightfit.report import explain, plan_document, study

class Model(nn.Module):
    frugal = False

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(4))

    def forward(self, x):
        if not self.frugal:
            x.repeat(64, 1)
        for block in self.blocks:
            x = block(x)
        return x

torch.manual_seed(0)
model, batch = Model(), torch.randn(64, 64)
loss = lambda model, batch: model(batch).square().mean()
trace = tightfit.trace(model, batch, loss=loss)
whole = tightfit.simulate(trace).peak_bytes
plan = tightfit.plan(trace, whole // 2, levers=["frugal"])
plan.save(sys.argv[1])
applied = tightfit.apply(model, plan)
on = model.frugal
applied.remove()
fitted = tightfit.fit(model, batch, budget=whole // 2, loss=loss)
fitted_settings = dict(fitted.plan.settings)
fitted.remove()
proof = tightfit.verify(model, batch, plan, loss=loss)
out = io.StringIO()
Console(file=out, width=200).print(explain(trace, plan))
print(json.dumps({
    "named": sorted(lever.value for lever in parse_levers("all,-tile")),
    "settings": dict(plan.settings), "exact": plan.exact, "replays": plan.replays,
    "budget": whole // 2, "planned": plan.peak_bytes, "walked": tightfit.simulate(trace, plan).peak_bytes,
    "whole": whole, "on": on, "off": model.frugal, "fitted": fitted_settings,
    "proof": {check.name: check.passed for check in proof.checks},
    "shares": {share.lever.value: share.bought_bytes for share in shares(trace, plan)},
    "explained": out.getvalue(), "facts": plan_document(plan, "toy", study(trace, plan))["facts"],
    "again": tightfit.Plan.load(sys.argv[1]) == plan,
}))
"""


def run(home: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(home), "COLUMNS": "200"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_file_and_one_line_make_a_lever(tmp_path: Path) -> None:
    package = tmp_path / "tightfit"
    shutil.copytree(SOURCE, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "levers" / "frugal.py").write_text(ROOM)
    registry = package / "core" / "levers.py"
    text = registry.read_text()
    last = '    OFFLOAD = "offload"'
    assert text.count(last) == 1
    registry.write_text(text.replace(last, REGISTRY_LINE + last))

    # the last line: newer solvers print a banner of their own
    found = json.loads(run(tmp_path, "-c", SCRIPT, str(tmp_path / "plan.json")).splitlines()[-1])
    assert "frugal" in found["named"]
    assert found["settings"] == {"frugal": "on"} and found["exact"] and not found["replays"]
    assert found["planned"] == found["walked"] <= found["budget"]
    assert found["on"] is True and found["off"] is False
    assert found["fitted"] == {"frugal": "on"}
    assert found["proof"] and all(found["proof"].values()), found["proof"]
    assert {"gradients", "peak", "prediction"} <= found["proof"].keys()
    assert found["shares"] == {"frugal": found["whole"] - found["walked"]}
    assert "the step fits with the frugal model" in found["explained"]
    assert "frugal: the temporary is left out" in found["explained"]
    assert dict(found["facts"])["frugal"] == "on"
    assert found["again"]
    assert "frugal" in run(tmp_path, "-m", "tightfit", "plan", "--help")

    # a release without the lever says so, instead of carrying half of the plan out
    with pytest.raises(PlanMismatch, match="the lever 'frugal', which this release of tightfit does not have"):
        tightfit.apply(nn.Linear(2, 2), Plan.load(tmp_path / "plan.json"))
