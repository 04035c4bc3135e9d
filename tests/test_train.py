"""`tightfit train`: TRL's settings, resuming after any end, running out of memory, and input that is wrong."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import safetensors.torch
import torch
import transformers
from rich.console import Console
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

import tightfit
from tightfit.core import Account, BudgetInfeasible, InvalidInput, Plan, TightfitError, format_bytes, from_json
from tightfit.integrations.recovery import OutOfMemory, Recovery, lower
from tightfit.levers.state_in_host import host
from tightfit.train import RunResult, TrainOptions, byte_tokenizer, last_checkpoint, progress, recipe, train
from tightfit.train import run as training
from tightfit.train.asked import as_asked
from tightfit.train.options import check_options

TINY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
    "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "attention_dropout": 0.1,
}  # fmt: skip
STEPS = 10
#: Two batches a step, an epoch's end on the way, dropout, checkpoints at steps 3, 6 and 9.
#: A TRL whose own loss goes through the logits in chunks, which a plan makes next to nothing of.
CHUNKED = importlib.util.find_spec("trl.kernels") is not None
TRL_OPTIONS = ("--save_steps", "3", "--gradient_accumulation_steps", "2", "--max_grad_norm", "0.5")
pytestmark = pytest.mark.usefixtures("short_studies")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model's shape and a text."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "tiny").mkdir()
    (folder / "tiny" / "config.json").write_text(json.dumps(TINY))
    (folder / "text.txt").write_text("".join(f"line {i} of the quick brown fox {i * i}. " for i in range(120)))
    return folder


def options(place: Path, out: Path, **changes: Any) -> TrainOptions:
    asked: dict[str, Any] = {
        "model": str(place / "tiny"), "data": str(place / "text.txt"), "batch": 4, "seq": 64, "steps": STEPS,
        "budget": "80%", "compare_steps": 0, "lr": 1e-3, "arguments": TRL_OPTIONS, "out": str(out),
    }  # fmt: skip
    return TrainOptions(**{**asked, **changes})


@pytest.fixture(scope="module")
def whole(place: Path) -> RunResult:
    """The run that nothing interrupts."""
    return train(options(place, place / "whole"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    name = "model.safetensors" if (folder / "model" / "model.safetensors").is_file() else "adapter_model.safetensors"
    found: dict[str, torch.Tensor] = safetensors.torch.load_file(folder / "model" / name)
    return found


def is_the_same_run(run: RunResult, whole: RunResult) -> bool:
    mine, other = weights(run.folder), weights(whole.folder)
    lines = [json.loads(line) for line in (run.folder / "losses.jsonl").read_text().splitlines()]
    return (
        run.status == "completed"
        and run.losses == whole.losses
        and [line["loss"] for line in lines] == list(whole.losses)
        and [line["step"] for line in lines] == list(range(1, len(whole.losses) + 1))
        and mine.keys() == other.keys()
        and all(torch.equal(mine[name], other[name]) for name in mine)
    )


def test_accumulated_losses_are_the_trainers_own(whole: RunResult) -> None:
    state = json.loads((whole.folder / "checkpoints" / "checkpoint-9" / "trainer_state.json").read_text())
    assert [entry["loss"] for entry in state["log_history"] if "loss" in entry] == list(whole.losses[:9])


# ---------------------------------------------------------------------------------------- kill -9, resume

#: Patches that kill the process; `kill()` is defined before them.
MOMENTS = {
    "before the folder is there": "training.Run.open = lambda *a: kill()",
    "in a step": "at(training.SFTTrainer, 'training_step', 9)",
    "after the weights of a checkpoint": "at(transformers.Trainer, '_save_optimizer_and_scheduler', 2)",
    "after the optimizer of a checkpoint": "at(transformers.Trainer, '_save_rng_state', 3)",
    "in the last file of a checkpoint": """
def save_to_json(self, path, real=transformers.TrainerState.save_to_json):
    real(self, path)
    if self.global_step == 6:
        text = open(path).read()
        open(path, "w").write(text[: len(text) // 2])
        kill()
transformers.TrainerState.save_to_json = save_to_json""",
    "while old checkpoints are deleted": """
import shutil
def rmtree(path, *a, real=shutil.rmtree, **k):
    if "checkpoint-" in str(path):
        os.unlink(os.path.join(path, "optimizer.pt"))
        kill()
    return real(path, *a, **k)
shutil.rmtree = rmtree""",
    "in the middle of a line of losses": """
def write(self, *a, real=training.Watch.on_step_end, **k):
    real(self, *a, **k)
    if len(self.rows) == 5:
        self.file.write('{"step": 6, "lo')
        self.file.flush()
        kill()
training.Watch.on_step_end = write""",
    "while the model is saved": """
def save(self, model, real=training.Run._save):
    os.replace = lambda *a: kill()
    real(self, model)
training.Run._save = save""",
    "before the last record": "at(training.Run, '_study', 1)",
}  # fmt: skip

CHILD = """
import os, signal, sys
import transformers
from tightfit.train import run as training
from tightfit.train.asked import as_asked
from tightfit.train.options import check_options
from tightfit.cli import main
def kill():
    os.kill(os.getpid(), signal.SIGKILL)
def at(owner, name, number):
    real, calls = getattr(owner, name), []
    def counted(*args, **kwargs):
        calls.append(name)
        if len(calls) == number:
            kill()
        return real(*args, **kwargs)
    setattr(owner, name, counted)
exec(sys.argv[1])
sys.exit(main(sys.argv[2:]))
"""


def killed(place: Path, out: Path, moment: str, *more: str) -> None:
    """A run that a moment of it kills. `more` goes over what is asked otherwise."""
    asked = options(place, out)
    arguments = [
        "train", "--model", str(asked.model), "--data", str(asked.data), "--batch", "4", "--seq", "64", "--steps",
        str(STEPS), "--budget", "80%", "--compare-steps", "0", "--lr", "1e-3", "--out", str(out), *TRL_OPTIONS, *more,
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", CHILD, MOMENTS[moment], *arguments],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.slow  # kills and resumes, as the test below does
def test_kill_in_a_checkpoint_and_resume(place: Path, whole: RunResult, tmp_path: Path) -> None:
    out = tmp_path / "run"
    killed(place, out, "after the weights of a checkpoint")
    assert (out / "checkpoints" / "checkpoint-6").is_dir()
    found = last_checkpoint(out / "checkpoints")
    assert found is not None and found[1] == 3
    assert json.loads((out / "record.json").read_text())["status"] == "running"
    run = train(TrainOptions(out=str(out), resume=True))
    assert is_the_same_run(run, whole)
    assert json.loads((out / "record.json").read_text())["observed"]["resumed_at"] == [3]


#: All that a step holds beside activations gives way: state waits in host memory, gradients go as they are stepped, or
#: wait there too where they are accumulated and clipped.
EVERYTHING_GIVES_WAY = {
    "in backward": ("state_in_host,step_in_backward", "1", "0"),
    "accumulated": ("state_in_host,gradients_in_host", "2", "0.5"),
}


@pytest.mark.parametrize("how", ["in backward", pytest.param("accumulated", marks=pytest.mark.slow)])
def test_kill_and_resume_at_a_budget_that_no_plan_of_activations_holds(
    how: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_host: list[Any] = []

    def loaded_on_host(optimizer: Any) -> Any:
        on_host.append(optimizer)
        return host.loaded_on_host(optimizer)

    monkeypatch.setattr("tightfit.integrations.trainer.loaded_on_host", loaded_on_host)
    beside, parts, clip = EVERYTHING_GIVES_WAY[how]
    levers = f"recompute,loss_in_place,nest,{beside}"
    changed = ("--gradient_accumulation_steps", parts, "--max_grad_norm", clip)
    asked: dict[str, Any] = {"batch": 1, "seq": 16, "budget": "50%", "arguments": (*TRL_OPTIONS, *changed)}
    with pytest.raises(BudgetInfeasible):
        train(options(place, tmp_path / "activations", **asked, levers="recompute,loss_in_place,nest"))
    plain = train(options(place, tmp_path / "plain", **{**asked, "budget": "100%"}, levers="recompute"))
    out = tmp_path / "run"
    more = ("--batch", "1", "--seq", "16", "--budget", "50%", "--levers", levers)
    killed(place, out, "after the weights of a checkpoint", *more, *changed)
    assert not [each for each in on_host if each.state]
    run = train(options(place, out, resume=True, **asked, levers=levers, spill=str(tmp_path)))
    assert len([each for each in on_host if each.state]) == 1  # a card may be too small for all of it
    assert is_the_same_run(run, plain)
    record = json.loads((out / "record.json").read_text())
    assert record["observed"]["resumed_at"] == [3]
    moved = [each for each in beside.split(",") if each.endswith("_in_host")]
    assert set(record["observed"]["host_bytes"]) == set(moved)
    account = record["observed"]["account"]  # of the process that went on, which was told of a folder
    assert account["file_bytes"] > 0 == account["pageable_bytes"] and record["observed"]["host_taken_bytes"]["file"] > 0
    lines = [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]
    assert max(line["peak_bytes"] for line in lines) <= (run.budget_bytes or 0)


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    def checkpoint(step: int, state: str) -> Path:
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
            (folder / name).write_text("")
        (folder / "trainer_state.json").write_text(state)
        return folder

    assert last_checkpoint(tmp_path) is None
    first = checkpoint(3, '{"global_step": 3}')
    checkpoint(5, '{"global_step": 5')
    checkpoint(6, '{"global_step": 3}')
    (checkpoint(7, '{"global_step": 7}') / "trainer_state.json").unlink()
    (checkpoint(8, '{"global_step": 8}') / "optimizer.pt").unlink()
    (checkpoint(9, '{"global_step": 9}') / "model.safetensors").unlink()
    (tmp_path / "checkpoint-other").mkdir()
    assert last_checkpoint(tmp_path) == (first, 3)
    assert last_checkpoint(tmp_path / "missing") is None
    second = checkpoint(12, '{"global_step": 12}')
    assert last_checkpoint(tmp_path) == (second, 12)


@pytest.mark.slow
def test_cut_short_after_the_last_step(
    place: Path, whole: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoint holds all steps already: going on from it saves the model and trains no step more."""

    def interrupted(self: Any, *args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training.Run, "_study", interrupted)
    assert train(options(place, tmp_path / "run")).status == "interrupted"
    monkeypatch.undo()
    found = last_checkpoint(tmp_path / "run" / "checkpoints")
    assert found is not None and found[1] == STEPS
    run = train(TrainOptions(out=str(tmp_path / "run"), resume=True))
    assert is_the_same_run(run, whole)
    assert run.proof is not None and run.passed and (run.folder / "study.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_at_any_moment_and_resume(moment: str, place: Path, whole: RunResult, tmp_path: Path) -> None:
    out = tmp_path / "run"
    killed(place, out, moment)
    run = train(options(place, out, resume=True))
    assert is_the_same_run(run, whole)


@pytest.mark.slow
def test_killed_again_and_again(place: Path, whole: RunResult, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for moment in ("in a step", "after the optimizer of a checkpoint", "before the last record"):
        killed(place, out, moment, "--resume")
    assert is_the_same_run(train(TrainOptions(out=str(out), resume=True)), whole)


class Interrupt(TrainerCallback):
    """Ctrl-C in a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def interrupt(monkeypatch: pytest.MonkeyPatch, callback: TrainerCallback) -> None:
    """Give the trainer of each run `callback`, until the patch is undone."""
    real = training.Run.trainer

    def interrupted(self: Any, *args: Any) -> Any:
        trainer = real(self, *args)
        trainer.add_callback(callback)
        return trainer

    monkeypatch.setattr(training.Run, "trainer", interrupted)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_adapters_resume_bit_for_bit(method: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"method": method, "steps": 6, "budget": "85%"}
    reference = train(options(place, tmp_path / "whole", **changes, compare_steps=3))
    assert reference.passed and reference.losses_identical
    assert reference.plan is not None and reference.plan.replays
    interrupt(monkeypatch, Interrupt(4))
    cut = train(options(place, tmp_path / "run", **changes))
    assert cut.status == "interrupted" and len(cut.losses) == 4
    monkeypatch.undo()
    run = train(TrainOptions(out=str(tmp_path / "run"), resume=True))
    assert is_the_same_run(run, reference)
    assert not list((tmp_path / "run" / "model").glob("*.bin"))


class InterruptBefore(TrainerCallback):
    """Ctrl-C between two steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_micro_batches_go_on_in_the_size_that_was_chosen(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, InterruptBefore(4))
    asked = {"batch": "auto", "global_batch": 8, "steps": 6, "budget": "35%", "arguments": ("--save_steps", "3")}
    cut = train(options(place, tmp_path / "run", **asked))
    assert cut.status == "interrupted" and len(cut.losses) == 4
    assert cut.micro_batches is not None and cut.micro_batches.accumulation > 1
    monkeypatch.undo()
    run = train(TrainOptions(out=str(tmp_path / "run"), resume=True))
    assert run.passed and len(run.losses) == 6 and run.losses[:4] == cut.losses
    assert run.micro_batches is not None and run.micro_batches.size == cut.micro_batches.size


@pytest.mark.parametrize(
    ("config", "changed", "batch", "global_batch"),
    [
        ({"batch": "auto", "global_batch": 12}, {}, "auto", 12),
        ({"batch": "auto", "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}, {}, "auto", 6),
        ({"batch": "auto", "global_batch": 12, "gradient_accumulation_steps": 2}, {}, "auto", 12),
        ({"batch": 5}, {}, 5, None),
        ({"batch": "auto", "global_batch": 12}, {"global_batch": 8}, "auto", 8),
        ({"batch": "auto", "global_batch": 12}, {"batch": 4}, 4, None),
        ({"batch": 5}, {"batch": "auto", "global_batch": 8}, "auto", 8),
    ],
)
def test_a_file_names_the_batches(
    config: dict[str, Any], changed: dict[str, Any], batch: int | str, global_batch: int | None, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("".join(f"{key}: {value}\n" for key, value in {"model_name_or_path": "gpt2", **config}.items()))
    asked_options = TrainOptions(config=str(file), out=str(tmp_path / "run"), **changed)
    check_options(asked_options)
    asked = as_asked(asked_options)[0]
    found, args = asked.resolved(), asked.recipe().args
    assert (found.batch, found.global_batch) == (batch, global_batch)
    assert args.per_device_train_batch_size == (global_batch or batch) and args.gradient_accumulation_steps == 1


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"global_batch": 8}, "is what batch: auto cuts into micro-batches"),
        ({"batch": 4, "global_batch": 8}, "is what batch: auto cuts into micro-batches"),
        ({"batch": "auto", "global_batch": 0}, "expected global_batch of at least 1, not 0"),
        ({"batch": "auto", "global_batch": "many"}, "global_batch in the config: expected int, not 'many'"),
        ({"batch": "some"}, "batch in the config with a number of sequences or auto, not 'some'"),
        ({"batch": 0}, "expected batch of at least 1, not 0"),
        ({"batch": 4, "per_device_train_batch_size": 2}, "the config has batch and per_device_train_batch_size"),
        ({"batches": "auto"}, "unknown key 'batches' in the config; did you mean 'batch'?"),
    ],
)
def test_a_file_that_names_half_of_it_is_refused(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("".join(f"{key}: {value}\n" for key, value in {"model_name_or_path": "gpt2", **config}.items()))
    with pytest.raises(InvalidInput) as refused:
        as_asked(TrainOptions(config=str(file), out=str(tmp_path / "run")))[0].resolved()
    assert said in str(refused.value)


@pytest.mark.slow
def test_a_run_from_a_file_is_cut_and_goes_on(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "run.yaml"
    keys = {
        "model_name_or_path": place / "tiny", "data": place / "text.txt", "batch": "auto", "global_batch": 8,
        "max_length": 64, "max_steps": 3, "budget": "8%" if CHUNKED else "35%", "save_strategy": "steps",
        "save_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none", "learning_rate": 0.001,
    }  # fmt: skip
    file.write_text("".join(f"{key}: {value}\n".replace("True", "true") for key, value in keys.items()))
    interrupt(monkeypatch, InterruptBefore(2))
    cut = train(TrainOptions(config=str(file), out=str(tmp_path / "run")))
    assert cut.status == "interrupted" and cut.micro_batches is not None and cut.micro_batches.accumulation > 1
    monkeypatch.undo()
    run = train(TrainOptions(out=str(tmp_path / "run"), resume=True))
    assert len(run.losses) == 3 and run.losses[:2] == cut.losses
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["options"]["batch"] == "auto" and record["options"]["global_batch"] == 8
    assert record["observed"]["micro_batches"]["size"] == cut.micro_batches.size
    with pytest.raises(InvalidInput, match="was made with --global-batch 8, not 4"):
        train(TrainOptions(out=str(tmp_path / "run"), resume=True, batch="auto", global_batch=4))


# ------------------------------------------------------------------------------------------ a plan that is given


@pytest.mark.slow
def test_a_plan_of_another_run_trains_and_goes_on_without_its_file(
    place: Path, whole: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = tmp_path / "plan.json", tmp_path / "run"
    file.write_text((whole.folder / "plan.json").read_text())
    interrupt(monkeypatch, InterruptBefore(6))
    cut = train(options(place, out, budget=None, plan=str(file)))
    assert cut.status == "interrupted" and whole.plan is not None
    monkeypatch.undo()
    file.unlink()
    run = train(TrainOptions(out=str(out), resume=True))
    assert is_the_same_run(run, whole) and run.plan is not None and run.plan.decisions == whole.plan.decisions
    assert run.budget_bytes == whole.budget_bytes and run.plan.bound_seconds == 0  # taken, not searched
    record = json.loads((out / "record.json").read_text())
    assert record["constraint"]["plan"] == str(file) and record["constraint"]["budget"] is None
    assert record["constraint"]["budget_bytes"] == whole.plan.budget_bytes and record["options"]["plan"] == str(file)


def test_a_file_names_a_plan_and_a_budget_beside_it(place: Path, whole: RunResult, tmp_path: Path) -> None:
    plan = str(whole.folder / "plan.json")
    keys = {
        "model_name_or_path": place / "tiny",
        "data": place / "text.txt",
        "plan": plan,
        "output_dir": tmp_path / "x",
    }
    (tmp_path / "run.yaml").write_text("".join(f"{key}: {value}\n" for key, value in keys.items()))
    config = str(tmp_path / "run.yaml")
    found = as_asked(TrainOptions(config=config))[0].resolved()
    assert (found.plan, found.budget) == (plan, None)
    found = as_asked(TrainOptions(config=config, budget="1GiB"))[0].resolved()
    assert (found.plan, found.budget) == (plan, "1GiB")
    assert as_asked(options(place, tmp_path / "y", budget=None))[0].resolved().budget == "60%"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"plan": "nowhere.json", "budget": None}, "cannot read the plan 'nowhere.json'"),
        ({"batch": "auto", "global_batch": 8}, "--plan is for one size of batch"),
        ({"budget": "60%"}, "a budget beside a plan takes the place of its bytes, so it is a size, not '60%'"),
        ({"seq": 128, "budget": None}, "the plan that was given takes"),
        ({"method": "lora", "budget": None}, "differs: planned for"),
    ],
)
def test_a_plan_that_cannot_be_taken(
    changes: dict[str, Any], said: str, place: Path, whole: RunResult, tmp_path: Path
) -> None:
    with pytest.raises(TightfitError) as caught:
        train(options(place, tmp_path / "run", **{"plan": str(whole.folder / "plan.json"), **changes}))
    assert said in str(caught.value) and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------ out of memory

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:132] DefaultCPUAllocator: can't allocate memory: you tried to ...")


@pytest.fixture
def in_training(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of the step that is being trained, none while it is planned and proven."""
    now: list[int] = []

    class Noting(Recovery):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_step_begin(args, state, control, **kwargs)
            now[:] = [state.global_step + 1]

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_step_end(args, state, control, **kwargs)
            now.clear()

    monkeypatch.setattr(training, "Recovery", Noting)
    yield now


def failing(real: Callable[..., Any], now: list[int], steps: list[int], error: Exception, after: bool) -> Any:
    """`real`, but with an error the first time that it is called in each of `steps`, which may name one twice."""
    left = list(steps)

    def call(*args: Any, **kwargs: Any) -> Any:
        out = real(*args, **kwargs) if after else None
        if now and now[0] in left:
            left.remove(now[0])
            raise error
        return out if after else real(*args, **kwargs)

    return call


def patch(monkeypatch: pytest.MonkeyPatch, where: str, now: list[int], steps: list[int]) -> None:
    if where == "forward":
        owner = training.PlainLoss
        monkeypatch.setattr(owner, "compute_loss", failing(owner.compute_loss, now, steps, CUDA, after=True))
    elif where == "backward":
        real, left = accelerate.Accelerator.backward, list(steps)

        def backward(self: Any, loss: torch.Tensor, **kwargs: Any) -> None:
            if not now or now[0] not in left:
                return real(self, loss, **kwargs)
            left.remove(now[0])
            # some gradients are there already when it happens
            parameter = next(iter(self._models[0].parameters()))
            hook = parameter.register_hook(lambda gradient: (_ for _ in ()).throw(CPU))
            try:
                real(self, loss, **kwargs)
            finally:
                hook.remove()

        backward.__code__ = backward.__code__.replace(co_filename=accelerate.accelerator.__file__)
        monkeypatch.setattr(accelerate.Accelerator, "backward", backward)
    elif where == "optimizer":  # while the state is made: of the last parameter half is there, nothing has changed yet
        init, todo = torch.optim.AdamW._init_group, list(steps)

        def half(self: Any, *args: Any, **kwargs: Any) -> Any:
            out = init(self, *args, **kwargs)
            if now and now[0] in todo:
                todo.remove(now[0])
                del list(self.state.values())[-1]["exp_avg_sq"]
                raise CUDA
            return out

        monkeypatch.setattr(torch.optim.AdamW, "_init_group", half)
    else:  # in the update, when some parameters have changed
        monkeypatch.setattr(torch, "_fused_adamw_", failing(torch._fused_adamw_, now, steps, CUDA, after=True))


@pytest.mark.parametrize(
    ("where", "steps"),
    [
        pytest.param("forward", [2, 5, 5], marks=pytest.mark.slow),
        ("torn", [5]),
        pytest.param("backward", [5], marks=pytest.mark.slow),
        pytest.param("optimizer", [1], marks=pytest.mark.slow),
    ],
)
def test_running_out_of_memory_changes_nothing(
    where: str, steps: list[int], place: Path, whole: RunResult, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, in_training: list[int],
) -> None:  # fmt: skip
    patch(monkeypatch, where, in_training, steps)
    run = train(options(place, tmp_path / "run"))
    assert is_the_same_run(run, whole)
    assert [retry.step for retry in run.retries] == steps
    assert {retry.phase for retry in run.retries} == {"optimizer" if where == "torn" else where}
    assert run.passed
    budgets = [(retry.budget_bytes_before, retry.budget_bytes_after) for retry in run.retries]
    assert all(after < before for before, after in budgets)
    record = json.loads((run.folder / "record.json").read_text())
    assert [retry["step"] for retry in record["observed"]["retries"]] == steps
    assert [retry["went_back_to"] for retry in record["observed"]["retries"]] == [3 if where == "torn" else None] * len(
        steps
    )
    assert Plan.load(run.folder / "plan.json").budget_bytes == budgets[-1][1]
    assert record["constraint"]["budget_bytes"] == budgets[0][0]


def test_out_of_memory_without_end(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_training: list[int]
) -> None:
    patch(monkeypatch, "forward", in_training, [5] * 9)
    with pytest.raises(OutOfMemory, match=r"forward of step 5, after 2 retries") as caught:
        train(options(place, tmp_path / "run", oom_retries=2))
    assert "\n" not in str(caught.value)
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["status"] == "failed" and "after 2 retries" in record["error"]
    assert len(record["observed"]["retries"]) == 2 and record["observed"]["steps"] == 4
    from tightfit.cli.program import exit_code

    assert exit_code(caught.value) == 1


@pytest.mark.slow
def test_a_plan_in_tiles_is_no_failure(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_training: list[int], capsys: Any
) -> None:
    """Its bits are others, its proof is a tolerance, and what follows when the memory runs out is such a plan too."""
    from tightfit.cli.program import main

    (tmp_path / "wide").mkdir()
    wide = {**TINY, "vocab_size": 4096, "hidden_size": 32, "num_hidden_layers": 2, "attention_dropout": 0.0}
    (tmp_path / "wide" / "config.json").write_text(json.dumps(wide))
    patch(monkeypatch, "forward", in_training, [3])
    asked = [
        "train", "--model", str(tmp_path / "wide"), "--data", str(place / "text.txt"), "--batch", "4", "--seq", "128",
        "--steps", "4", "--budget", "60%", "--levers", "recompute,tile", "--compare-steps", "2", "--out",
        str(tmp_path / "run"), "--json",
    ]  # fmt: skip
    assert main(asked) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] and report["plan"]["tiling"] and len(report["retries"]) == 1
    gradients = next(check for check in report["proof"]["checks"] if check["name"] == "gradients")
    assert gradients["passed"] and "float64" in gradients["expected"]
    assert report["losses"][:2] == pytest.approx(report["compared_losses"], rel=1e-5)
    assert not Plan.load(tmp_path / "run" / "plan.json").exact
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["options"]["levers"] == "recompute,tile" and record["observed"]["checks"]
    assert record["constraint"]["host_budget_bytes"] is None and record["observed"]["host_bytes"] == {}
    assert record["observed"]["host_taken_bytes"] == {"pinned": 0, "pageable": 0, "file": 0}


@pytest.mark.slow
def test_the_record_has_the_account_of_the_process(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the plan says, beside what the allocator and the pool had; a run that goes on does not forget it."""
    from tightfit.cli.program import main
    from tightfit.report import run_document

    folder = tmp_path / "run"
    changes = {"levers": "recompute,state_in_host", "budget": "70%", "steps": 5}
    run = train(options(place, folder, **changes))
    assert run.status == "completed" and run.plan is not None
    record = json.loads((folder / "record.json").read_text())
    observed = record["observed"]
    told = from_json(Account, observed["account"], "the record")
    assert told.allocated_bytes == told.reserved_bytes == observed["predicted_peak_bytes"] == run.plan.peak_bytes
    assert told.waiting["pageable"] == observed["host_bytes"] and told.pinned_bytes == told.file_bytes == 0
    taken = observed["host_taken_bytes"]
    pages = 2 * 30 * 4096  # each of AdamW's two tensors is rounded up to one, for each of 30 parameters
    assert 0 < told.pageable_bytes <= taken["pageable"] <= told.pageable_bytes + pages
    assert taken["pinned"] == taken["file"] == 0
    assert observed["reserved_bytes"] is None  # the CPU has no caching allocator, and nothing is guessed
    facts = run_document(folder)["facts"]
    assert f"{format_bytes(told.pageable_bytes)} in pageable host memory" in facts["the process, predicted"]
    assert facts["host memory, measured"] == f"{format_bytes(taken['pageable'])} pageable"
    assert "reserved, measured" not in facts

    reserved = iter([30, 20, 40, *[10] * 100])
    monkeypatch.setattr(tightfit.accelerator, "reserved_peak_bytes", lambda device: next(reserved))
    real = training.Run.trainer
    interrupt(monkeypatch, Interrupt(4))
    assert train(options(place, tmp_path / "cut", **changes)).status == "interrupted"
    before = json.loads((tmp_path / "cut" / "record.json").read_text())["observed"]

    def broken(self: Any, *args: Any) -> Any:
        raise RuntimeError("no trainer")

    monkeypatch.setattr(training.Run, "trainer", broken)
    with pytest.raises(RuntimeError, match="no trainer"):  # before there is a plan again
        train(TrainOptions(out=str(tmp_path / "cut"), resume=True))
    kept = json.loads((tmp_path / "cut" / "record.json").read_text())
    assert kept["status"] == "failed" and kept["observed"]["account"] == before["account"]
    monkeypatch.setattr(training.Run, "trainer", real)
    resumed = train(TrainOptions(out=str(tmp_path / "cut"), resume=True))
    assert resumed.status == "completed" and resumed.plan is not None
    observed = json.loads((tmp_path / "cut" / "record.json").read_text())["observed"]
    assert observed["reserved_bytes"] == 40
    assert observed["account"]["allocated_bytes"] == resumed.plan.peak_bytes  # of the plan of this process
    assert observed["account"]["waiting"]["pageable"] == observed["host_bytes"]
    assert observed["host_taken_bytes"]["pageable"] >= before["host_taken_bytes"]["pageable"] > 0
    assert run_document(tmp_path / "cut")["facts"]["reserved, measured"] == "40 B"

    # a record of before says less, and is read all the same
    for key in ("account", "reserved_bytes", "host_taken_bytes"):
        del record["observed"][key]
    (folder / "record.json").write_text(json.dumps(record))
    assert "the process, predicted" not in run_document(folder)["facts"]
    assert main(["report", str(folder)]) == 0 and main(["train", "--out", str(folder), "--resume"]) == 0
    capsys.readouterr()


def test_a_smaller_plan_is_as_exact_as_the_one_before() -> None:
    """Nor does it move anything off the device, unless that was asked for."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=4096
        )
    )
    ids = torch.randint(0, 96, (4, 128))
    recorded = tightfit.trace(model, {"input_ids": ids, "labels": ids})
    plan = tightfit.plan(recorded, "90%")
    while (smaller := lower(recorded, plan)) is not plan:
        assert smaller.exact and not smaller.offloaded_bytes and smaller.peak_bytes < plan.peak_bytes
        plan = smaller
    tiled = tightfit.plan(recorded, plan.peak_bytes - 1)
    assert not tiled.exact and lower(recorded, tiled).peak_bytes <= tiled.peak_bytes


def test_another_error_is_not_survived(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_training: list[int]
) -> None:
    owner = training.PlainLoss
    wrong = failing(owner.compute_loss, in_training, [2], RuntimeError("shapes differ"), after=False)
    monkeypatch.setattr(owner, "compute_loss", wrong)
    with pytest.raises(RuntimeError, match="shapes differ"):
        train(options(place, tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "record.json").read_text())["error"] == "RuntimeError: shapes differ"


# --------------------------------------------------------------------------------------- TRL's own configs


def yaml(place: Path, folder: Path, **keys: Any) -> str:
    found = {
        "model_name_or_path": str(place / "tiny"), "dataset_name": str(folder / "rows.jsonl"), "max_length": 96,
        "per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": "1e-3", "logging_steps": 2, "use_cpu": True,
        "bf16": False, "output_dir": str(folder / "sft"), "report_to": "none", **keys,
    }  # fmt: skip
    rows = [{"prompt": f"{i} plus {i} is ", "completion": f"{2 * i}, of course. " * (i % 3 + 1)} for i in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sft.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in found.items()))
    return str(folder / "sft.yaml")


def test_a_trl_yaml_trains_as_trl_would(place: Path, tmp_path: Path) -> None:
    """The same settings, data and model in TRL's own trainer, without us: the same losses, bit for bit."""
    run = train(TrainOptions(config=yaml(place, tmp_path), budget="97%"))
    assert run.folder == tmp_path / "sft" and run.status == "completed"
    from datasets import load_dataset

    from tightfit.integrations.transformers import load_model

    model, _ = load_model(str(place / "tiny"), seed=42)
    args = SFTConfig(
        max_length=96, per_device_train_batch_size=2, max_steps=4, learning_rate=1e-3, logging_steps=1, use_cpu=True,
        bf16=False, output_dir=str(tmp_path / "theirs"), report_to="none", save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False,
    )  # fmt: skip
    notes = json.loads((run.folder / "record.json").read_text())["observed"]["notes"]
    assert not any("is off" in note for note in notes) and any("gradients of the first batch" in note for note in notes)
    rows = load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train")
    trainer = SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=byte_tokenizer())
    trainer.train()
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == list(run.losses)


@pytest.mark.slow
def test_checkpointing_in_a_yaml_gives_way(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own is off, in the steps that are compared too, and the run says so."""
    on: list[bool] = []
    real = SFTTrainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        on.append(self.model.is_gradient_checkpointing)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "training_step", training_step)
    keys = {"gradient_checkpointing": True, "compare_steps": 2, "max_steps": 2}
    # TRL's own loss is made so small that a step of this size needs no replays otherwise
    run = train(TrainOptions(config=yaml(place, tmp_path, **keys), budget="97%", levers="recompute"))
    assert run.passed and run.losses_identical and run.plan is not None and run.plan.replays
    assert on == [False] * 4
    notes = json.loads((run.folder / "record.json").read_text())["observed"]["notes"]
    assert "gradient_checkpointing in these settings is off: the plan decides what is recomputed" in notes


@pytest.mark.parametrize("key", ["activation_offloading", "torch_compile", "use_liger_kernel"])
def test_what_cannot_stand_beside_a_plan_is_refused(key: str, place: Path, tmp_path: Path) -> None:
    with pytest.raises(TightfitError, match=key):
        train(TrainOptions(config=yaml(place, tmp_path, **{key: True})))
    assert not (tmp_path / "sft").exists()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"levers": "tiles"}, "unknown lever 'tiles'"),
        ({"learning_rat": 1e-3}, "unknown key 'learning_rat' in the config; did you mean 'learning_rate'?"),
        ({"max_steps": "many"}, "max_steps in the config: expected int, not 'many'"),
        ({"max_steps": 2.5}, "max_steps in the config: expected int, not 2.5"),
        ({"max_steps": True}, "max_steps in the config: expected int, not True"),
        ({"learning_rate": [1, 2]}, "learning_rate in the config: expected one value"),
        ({"use_peft": "perhaps"}, "use_peft in the config: expected true or false"),
        ({"dtype": "float8"}, "dtype in the config: 'float8' is none of"),
        ({"dataset_name": "missing/rows.jsonl"}, "missing/rows.jsonl"),
        ({"data": "text.txt"}, "give one of data, dataset_name and datasets"),
        ({"model_name_or_path": None}, "names no model"),
        ({"eval_strategy": "steps"}, "no split 'test'"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "8 bit and 4 bit"),
        ({"budget": "lots"}, "lots"),
    ],
)
def test_wrong_configs(keys: dict[str, Any], said: str, place: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as caught:
        train(TrainOptions(config=yaml(place, tmp_path, **keys)))
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "sft").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.yaml", "- 1\n", "is no mapping"),
        ("a.yaml", "a: [1\n", "is not YAML"),
        ("a.yaml", None, "cannot read the config"),
    ],
)
def test_broken_configs(name: str, content: str | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InvalidInput, match=said):
        train(TrainOptions(config=str(tmp_path / name), out=str(tmp_path / "run")))


def test_wrong_data(place: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"body": ["a text"] * 9}), tmp_path / "other.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    pq.write_table(pa.table({"text": [1, 2, 3]}), tmp_path / "numbers.parquet")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "none.jsonl").write_text("")
    (tmp_path / "nulls.jsonl").write_text('{"text": "fine"}\n{"text": null}\n')
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "short.txt").write_text("too short")
    for name, said in {
        "other.parquet": "has no column 'text'; it has body",
        "empty.parquet": "is empty",
        "numbers.parquet": "holds int64, not text",
        "damaged.parquet": "cannot read the data",
        "bad.jsonl": "line 2",
        "none.jsonl": "is empty",
        "nulls.jsonl": "rows without a text",
        "latin.txt": "is not UTF-8",
        "short.txt": "give more data",
        "missing.csv": "No such file",
    }.items():
        with pytest.raises(InvalidInput, match=said):
            train(options(place, tmp_path / "run", data=str(tmp_path / name)))
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("names", [(), ("notes.xyz",), ("sub/notes.xyz",), (".hidden",)])
def test_a_folder_without_data_says_so(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("hello")
    with pytest.raises(InvalidInput, match=r"holds no data files: expected .csv, .json, .jsonl, .parquet or .txt"):
        recipe._local(str(tmp_path), "text")


@pytest.mark.parametrize("name", ["d[1]", "d*", "d?", "."])
def test_a_path_is_no_pattern(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the name that was given nor the working folder, which `datasets` puts in front of it."""
    work = tmp_path / "w[1]"
    for folder, text in (("d1", "another's"), (name, "mine")):
        (work / folder).mkdir(parents=True, exist_ok=True)
        if folder != ".":
            (work / folder / "a.txt").write_text(text)
            (work / f"{folder}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    monkeypatch.chdir(work)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    with progress.quiet_libraries():
        if name == ".":
            assert recipe._local("d1", "text")[0]["train"][:]["text"] == ["another's"]
        else:
            assert recipe._local(name, "text")[0]["train"][:]["text"] == ["mine"]
            assert recipe._local(f"{name}.jsonl", "text")[0][:]["text"] == ["mine"]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a.bin": b"\x8c", "b.txt": b"a\x8c"}, "b.txt' is not UTF-8 text (byte 1): mend that file, or move it"),
        ({"a.txt": b"", "b.txt": b""}, "a.txt' is empty, as all its files are: give text"),
        ({"a.jsonl": b'{"text":"a"}', "b.jsonl": b'{"txt":"a"}'}, "a.jsonl' has the columns text and "),
        ({"a.csv": b"text\na\n", "b.csv": b"txt,x\na,b\n"}, "b.csv' has txt, x: give all files the same columns"),
        ({"a.jsonl": b'{"text":"a"}', "b.jsonl": b'{"text":\n'}, "line 1 of "),
        ({"a.json": b'[{"text":"a"}]', "b.json": b'[{"text": "b"}, "a"]'}, "b.json' holds something else than JSON"),
        ({"a.parquet": b"PAR1 and no more"}, "a.parquet' is not Parquet"),
    ],
)
def test_the_file_of_a_folder_that_is_no_data_is_named(files: dict[str, bytes], said: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with progress.quiet_libraries(), pytest.raises(InvalidInput) as caught:
        recipe._local(str(tmp_path), "text")
    assert said in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_no_json_is_told_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.json").write_text("{\n  x\n")
    with progress.quiet_libraries(), pytest.raises(InvalidInput, match=r"bad.json' is not JSON \(line 2\)"):
        recipe._local(str(tmp_path / "bad.json"), "text")
    assert "Failed" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["model", "data", "out", "plan"])
def test_an_empty_name_is_not_left_out(name: str, place: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=f"--{name}.* is given, but empty"):
        as_asked(dataclasses.replace(options(place, tmp_path / "run"), **{name: ""}))


@pytest.mark.parametrize("key", ["model_name_or_path", "data", "dataset_name", "base_config", "output_dir", "plan"])
def test_an_empty_name_in_a_file_is_not_left_out(key: str, place: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=f"{key} is given, but empty"):
        as_asked(TrainOptions(config=yaml(place, tmp_path, **{key: ""})))


@pytest.mark.parametrize("width", [40, 60, 80, 99, 100, 200])
@pytest.mark.parametrize(
    ("step", "steps", "figures"),
    [
        (2, 4, (12.345, 100.0, 44 << 20, 45 << 20)),
        (12_345, 99_999, (12.345, 123_456.0, 189 << 20, (190 << 20) + (1 << 19))),
        (99_999, 100_000, (123.456, 1_234_567.0, 1_073_636_966, 1 << 30)),
        (9_999_999, 99_999_999, (1e30, 1_234_567.0, 1_073_636_966, 1023 << 30)),
        (1, 10, None),
    ],
)
def test_the_progress_line_is_never_cut(width: int, step: int, steps: int, figures: Any) -> None:
    """What there is no room for is left out whole, the least important first; the counter of steps always stands."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, color_system=None)
    words = progress.Figures() if figures is None else progress.figures_of(*figures)
    with progress.progress_bar(console) as bar:
        bar.add_task("train", total=steps, completed=step, figures=words)
    counter = f"step {step:{len(str(steps))}}/{steps}"
    line = next(each for each in screen.getvalue().splitlines() if counter in each)
    line = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]|\r", "", line).strip()
    assert line.startswith(counter) and len(line) <= width
    known = [each for each in (words.loss, "-:--:--", words.peak, words.speed) if each]  # the most important first
    there = [each for each in known if each in line]
    assert there == known[: len(there)]
    rest = re.sub("[━╸╺ ]", "", line)
    assert len(rest) == sum(len(each.replace(" ", "")) for each in [counter, *there])  # and nothing in part
    if there != known:
        assert len(line) + 2 + len(known[len(there)]) > width
    if width == 80 and steps == 99_999:
        assert there == known


def test_local_files_train(place: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"body": [f"text number {i} " * 9 for i in range(16)]}), tmp_path / "rows.parquet")
    run = train(
        options(
            place, tmp_path / "run", data=str(tmp_path / "rows.parquet"), steps=2,
            arguments=("--dataset_text_field", "body"),
        )
    )  # fmt: skip
    assert len(run.losses) == 2
    record = json.loads((run.folder / "record.json").read_text())
    assert len(record["data"]["sha256"]) == 64 and record["data"]["windows"] == 16


@pytest.mark.parametrize("setting", [("--learning_rate", "nan"), ("--adam_beta1", "2")])
def test_what_the_optimizer_refuses_is_said_before_anything_is_written(
    setting: tuple[str, str], place: Path, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match=r"TRL refuses .*: Invalid"):
        train(options(place, tmp_path / "run", steps=1, arguments=setting))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("decay", ["-1", "nan", "inf"])
def test_a_weight_decay_that_makes_weights_grow_is_refused(decay: str, place: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=f"expected a weight_decay of at least 0, not {decay}"):
        train(options(place, tmp_path / "run", steps=1, arguments=("--weight_decay", decay)))
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------ wrong resuming


def test_resuming_what_cannot_be(place: Path, whole: RunResult, tmp_path: Path) -> None:
    before = sorted(path.name for path in whole.folder.rglob("*"))
    again = train(TrainOptions(out=str(whole.folder), resume=True))
    assert again.losses == whole.losses and again.passed and again.status == "completed"
    for changes, said in (
        ({"batch": 2}, "was made with --batch 4, not 2"),
        ({"steps": 99}, "--steps 10, not 99"),
        ({"arguments": ("--warmup_steps", "3")}, "leave them out"),
    ):
        with pytest.raises(InvalidInput, match=said):
            train(options(place, whole.folder, resume=True, **changes))
    assert sorted(path.name for path in whole.folder.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "missing"):
        with pytest.raises(InvalidInput, match="no run in"):
            train(TrainOptions(out=str(tmp_path / folder), resume=True))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine").write_text("")
    with pytest.raises(InvalidInput, match=r"no record\.json"):
        train(TrainOptions(out=str(tmp_path / "other"), resume=True))
    with pytest.raises(InvalidInput, match="--out"):
        train(TrainOptions(resume=True))


def test_a_full_disk(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files above a limit cannot be written, as on a full disk: one line, a whole record, no half checkpoint."""
    from tightfit.cli.program import main

    before, opened = resource.getrlimit(resource.RLIMIT_FSIZE), training.Run.open

    def full_from_here(run: training.Run, *asked: Any) -> None:
        opened(run, *asked)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))

    out = tmp_path / "run"
    monkeypatch.setattr(training.Run, "open", full_from_here)
    try:
        status = main([
            "train", "--model", str(place / "tiny"), "--data", str(place / "text.txt"), "--batch", "4", "--seq", "64",
            "--steps", "4", "--budget", "80%", "--compare-steps", "0", "--out", str(out), "--save_steps", "2",
        ])  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    monkeypatch.undo()
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("tightfit:")]
    assert status == 1 and len(lines) == 1, said
    assert "Traceback" not in said
    record = json.loads((out / "record.json").read_text())
    assert record["status"] == "failed" and record["error"]
    assert last_checkpoint(out / "checkpoints") is None
    assert not list((out / "checkpoints").glob("checkpoint-*"))
    assert not (out / "model").exists() and not (out / ".model").exists()
    run = train(TrainOptions(out=str(out), resume=True))
    assert run.status == "completed" and len(run.losses) == 4


def test_the_parser_is_transformers_own() -> None:
    """So that a new option of TRL is one of ours without a change here."""
    from tightfit.train.recipe import resolve

    recipe = resolve({"model_name_or_path": "gpt2", "neftune_noise_alpha": 5}, ["--weight_decay", "0.1"])
    assert recipe.args.neftune_noise_alpha == 5 and recipe.args.weight_decay == 0.1
    with pytest.raises(InvalidInput, match="unknown option '--weight_decai'; did you mean '--weight_decay'"):
        resolve(None, ["--weight_decai", "0.1"])
    assert transformers.TrainingArguments in type(recipe.args).__mro__
