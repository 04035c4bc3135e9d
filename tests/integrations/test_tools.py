"""LLaMA-Factory, ms-swift and Axolotl: whole runs with the callback leave the weights of those without it, within the
budget. They run where the package is installed; what Axolotl's plug-in does is tested on a stand-in for its base class.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.docs.test_pages import blocks_of
from transformers import Trainer, TrainingArguments

from tightfit.core import InvalidInput, Unsupported
from tightfit.integrations import generated
from tightfit.integrations.transformers import TightfitCallback

PAGE = "docs/how_to/fine_tuning_tools.md"
#: Tells, at the end of the process, what the callbacks saw.
WITNESS = """
import atexit, json
from tightfit.integrations import trainer
made, init = [], trainer.TightfitCallback.__init__
def noting(self, *args, **kwargs):
    made.append(self)
    init(self, *args, **kwargs)
trainer.TightfitCallback.__init__ = noting
def tell():
    told = [{"budget": c.plan.budget_bytes, "peaks": c.peaks, "proven": c.proof.passed, "replays": c.plan.replays}
            for c in made if c.plan is not None]
    if told:  # a process that the tool starts has none
        open("witness.json", "w").write(json.dumps(told))
atexit.register(tell)
"""


def run(folder: Path, *command: str, witness: bool = False) -> None:
    # Axolotl draws LoRA's first matrices before it sets its seed, so that two of its own runs differ
    (folder / "sitecustomize.py").write_text("import torch\ntorch.manual_seed(0)\n" + (WITNESS if witness else ""))
    path = os.pathsep.join([str(folder), str(Path(__file__).parents[2] / "src")])
    settings = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=os.environ | settings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def weights(folder: Path) -> dict[str, str]:
    found = sorted(p for p in folder.rglob("adapter_model.safetensors"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def without(name: str, folder: Path) -> list[str]:
    """The command of the page's run by `name`, changed to run without tightfit."""
    if name == "llamafactory":
        script = folder / "train.py"
        script.write_text(re.sub(r"callbacks=\[.*\]", "", script.read_text()))
    if name == "axolotl":
        settings = (folder / "axolotl.yaml").read_text().split("\nbase_model", 1)[1]
        off = [f"lora_{part}_kernel: false\n" for part in ("mlp", "qkv", "o", "embedding")]
        (folder / "axolotl.yaml").write_text("base_model" + settings + "\n" + "".join(off))
    return []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llamafactory", "swift", "axolotl"])
def test_a_tools_run_is_the_one_without_the_callback(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed here")
    blocks = blocks_of(PAGE)
    (commands,) = [block.source.splitlines() for block in blocks if block.needs == name]
    command = commands[1].split("python ", 1)[1].split()
    for block in blocks:
        if block.title:
            (tmp_path / block.title).write_text(block.source + "\n")
    if name == "swift":
        command += ["--save_steps", "3", "--save_only_model", "true"]
    run(tmp_path, "small.py")
    run(tmp_path, *command, witness=True)
    (seen,) = json.loads((tmp_path / "witness.json").read_text())
    assert seen["proven"] and seen["replays"] and len(seen["peaks"]) == 3
    assert max(seen["peaks"]) <= seen["budget"]
    ours = weights(tmp_path)
    for folder in tmp_path.glob("out-*"):
        folder.rename(tmp_path / "before")
    without(name, tmp_path)
    if name == "swift":
        command = [word for word in command if word not in ("--callbacks", "tightfit")]
    run(tmp_path, *command)
    (out,) = tmp_path.glob("out-*")
    assert ours and weights(out) == ours


# ------------------------------------------------------------------- a trainer that adds to its batches and counts


class Counts(Trainer):
    """As ms-swift's and Axolotl's trainers do: what the loss needs is added to each batch, and tokens are counted."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.custom_metrics = {"train": [0]}

    def _prepare_inputs(self, inputs: Any) -> Any:
        return {**super()._prepare_inputs(inputs), "weight": 2.0}

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        weight = inputs.pop("weight")
        state: Any = self.state
        state.tokens = getattr(state, "tokens", 0) + inputs["input_ids"].numel()
        self.custom_metrics["train"][0] += 1
        return weight * super().compute_loss(model, inputs, *args, **kwargs)


def counting(folder: Path, callbacks: list[Any]) -> Any:
    from tests.integrations.runs import model  # with TRL, which some of the tools have in an older release

    torch.manual_seed(0)
    rows = [{"input_ids": t, "labels": t} for t in torch.randint(3, 200, (16, 40)).tolist()]
    options: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1,
        "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    return Counts(model(), TrainingArguments(**options), train_dataset=rows, callbacks=callbacks)


def test_a_trainer_that_adds_to_its_batches_and_counts(tmp_path: Path) -> None:
    from tests.integrations.runs import told

    plain = counting(tmp_path / "plain", [])
    plain.train()
    callback = TightfitCallback("85%")
    ours = counting(tmp_path / "ours", [callback])
    assert not generated.generates(ours)
    ours.train()
    assert callback.proof is not None and callback.proof.passed and callback.plans == 1
    assert told(ours) == told(plain)
    assert (ours.custom_metrics, ours.state.tokens) == (plain.custom_metrics, plain.state.tokens)
    with pytest.raises(Unsupported, match=r"Counts adds to each batch \(_prepare_inputs\)"):
        counting(tmp_path / "cut", [TightfitCallback("85%", micro_batch=2)]).train()


# --------------------------------------------------------------------------------------------- Axolotl's plug-in


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`tightfit.integrations.axolotl` with a stand-in for Axolotl, of which it needs the base class alone."""
    base = types.ModuleType("axolotl.integrations.base")
    base.BasePlugin = type("BasePlugin", (), {})  # type: ignore[attr-defined]
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "axolotl.integrations.base", base)
    monkeypatch.delitem(sys.modules, "tightfit.integrations.axolotl", raising=False)
    yield importlib.import_module("tightfit.integrations.axolotl")
    sys.modules.pop("tightfit.integrations.axolotl", None)


NAME = "tightfit.integrations.axolotl.TightfitPlugin"


class Config(dict):  # type: ignore[type-arg]
    """As Axolotl's: keys are attributes, and what is not there is None."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


def test_axolotls_yaml_becomes_the_callbacks_arguments(plugin: Any) -> None:
    made = plugin.TightfitPlugin()
    assert made.get_input_args() == "tightfit.integrations.axolotl.TightfitArgs"
    yaml = Config(plugins=[NAME], tightfit=Config(budget="22GiB", exact=True, levers=["recompute"], verify=False))
    made.register(yaml)
    (callback,) = made.add_callbacks_pre_trainer(yaml, None)
    assert callback is made.callback and isinstance(callback, TightfitCallback)
    assert (callback.budget, callback.exact, callback.verify) == ("22GiB", True, False)
    assert [lever.value for lever in callback.levers or ()] == ["recompute"]
    assert made.add_callbacks_pre_trainer(Config(plugins=["another.Plugin"]), None) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"budget": "22 gigs"}, "22 gigs"), ({"budget": "80%", "budgte": 1}, "budgte"), ({}, "budget"),
        ({"budget": "80%", "levers": ["recmpute"]}, "recmpute"),
    ],
)  # fmt: skip
def test_a_wrong_value_in_axolotls_yaml_is_named(settings: dict[str, Any], said: str, plugin: Any) -> None:
    with pytest.raises(ValueError, match=said):
        plugin.TightfitArgs.model_validate({"tightfit": settings})


def test_axolotls_kernels_make_way_or_are_refused(plugin: Any, capsys: Any) -> None:
    made = plugin.TightfitPlugin()
    yaml = Config(plugins=[NAME], tightfit={"budget": "80%"}, adapter="lora")
    made.register(yaml)
    assert [yaml[key] for key in plugin._LORA_KERNELS] == [False] * 4
    assert "LoRA kernels" in capsys.readouterr().err
    with pytest.raises(Unsupported, match=r"lora_mlp_kernel: true and the plug-in of tightfit"):
        made.register(Config(plugins=[NAME], tightfit={"budget": "80%"}, lora_mlp_kernel=True))
    with pytest.raises(InvalidInput, match=r"has no key tightfit"):
        made.register(Config(plugins=[NAME]))
    other = Config(plugins=["another.Plugin"], lora_mlp_kernel=True)  # of an earlier configuration
    made.register(other)
    assert other == {"plugins": ["another.Plugin"], "lora_mlp_kernel": True}
