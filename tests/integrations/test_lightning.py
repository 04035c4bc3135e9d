"""The callback in Lightning's real trainings: weights, losses, metrics and checkpoints are those without it."""

from __future__ import annotations

import copy
import io
import itertools
import random
import types
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")
import lightning.pytorch as pl
from lightning.pytorch import callbacks as lightnings
from lightning.pytorch.loggers import TensorBoardLogger
from tests.integrations.lightnings import Base, Language, Pictures, data_for, run
from transformers import BatchEncoding

from tightfit.core import BudgetInfeasible, Lever, ReplayDiverged, Unsupported
from tightfit.integrations import lightning as subject
from tightfit.integrations.lightning import TightfitCallback
from tightfit.integrations.python_state import python_state_kept

slow = pytest.mark.slow


def same(ours: Any, plain: Any) -> bool:
    """Equal, bit for bit, all the way down."""
    if isinstance(plain, torch.Tensor):
        return isinstance(ours, torch.Tensor) and torch.equal(ours, plain)
    if isinstance(plain, dict):
        return ours.keys() == plain.keys() and all(same(ours[key], plain[key]) for key in plain)
    if isinstance(plain, (list, tuple)):
        return len(ours) == len(plain) and all(map(same, ours, plain))
    return bool(ours == plain)


def untouched(module: Any) -> bool:
    """Is nothing of the callback left on the module and on the strategy?"""
    return not any("forward" in vars(m) for m in module.modules()) and "training_step" not in vars(
        module.trainer.strategy
    )


def assert_same_run(
    kind: type[Base], tmp_path: Path, budget: str | int, others: Any = list, **more: Any
) -> TightfitCallback:
    """Train with and without the callback and compare all there is."""
    plain = run(kind, others(), tmp_path, **more)
    drawn = torch.get_rng_state(), random.getstate()
    callback = TightfitCallback(budget)
    ours = run(kind, [callback, *others()], tmp_path, **more)
    assert torch.equal(torch.get_rng_state(), drawn[0]) and random.getstate() == drawn[1]
    assert ours.losses == plain.losses and ours.kinds == plain.kinds and ours.calls == plain.calls
    assert same(dict(ours.state_dict()), dict(plain.state_dict()))
    assert same(ours.trainer.callback_metrics, plain.trainer.callback_metrics)
    for module in (ours, plain):
        module.trainer.save_checkpoint(tmp_path / f"{module is ours}.ckpt")
    files = [torch.load(tmp_path / f"{each}.ckpt", weights_only=False) for each in (True, False)]
    assert same(*files) and b"tightfit" not in (tmp_path / "True.ckpt").read_bytes()
    assert callback.plan is not None and callback.plan.replays > 0 and callback.plan.exact
    assert callback.proof is not None and callback.proof.passed, callback.proof.checks
    assert len(callback.peaks) == len(ours.losses) or others is not list
    assert untouched(ours)
    return callback


@pytest.mark.parametrize(
    ("kind", "budget", "more"),
    [
        pytest.param(Pictures, "85%", {"accumulate_grad_batches": 2}, id="pictures, accumulated"),
        pytest.param(Language, "90%", {}, id="language"),
        pytest.param(Language, "90%", {"precision": "bf16-mixed", "gradient_clip_val": 0.1}, marks=slow, id="bf16"),
        pytest.param(Language, "90%", {"accumulate_grad_batches": 2, "max_steps": 4}, marks=slow, id="accumulated"),
        pytest.param(Pictures, "85%", {"precision": "bf16-mixed"}, marks=slow, id="pictures in bf16"),
        pytest.param(Pictures, "85%", {"precision": "bf16-true"}, marks=slow, id="pictures in true bf16"),
        pytest.param(Pictures, "85%", {"precision": "64-true"}, marks=slow, id="pictures in 64 bits"),
    ],
)
def test_a_whole_run_is_the_one_without_the_callback(
    kind: type[Base], budget: str, more: dict[str, Any], tmp_path: Path
) -> None:
    callback = assert_same_run(kind, tmp_path, budget, **more)
    assert callback.plan is not None and max(callback.peaks) <= callback.plan.budget_bytes * 1.005
    assert callback.plans == 1


@slow
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_longer_batch_is_planned_for_before_it_runs(accumulated: int, tmp_path: Path) -> None:
    counted = TightfitCallback("100%", verify=False)
    sizes = (8, 8, 12, 12, 8, 12)
    more: dict[str, Any] = {
        "sizes": sizes, "max_steps": 6 // accumulated, "accumulate_grad_batches": accumulated
    }  # fmt: skip
    run(Pictures, [counted], tmp_path, **more)
    budget_bytes = max(counted.peaks) * 9 // 10
    callback = assert_same_run(Pictures, tmp_path, budget_bytes, **more)
    assert callback.plans == 2 and any("longer batch" in line for line in callback.said)
    assert callback.plan is not None and callback.plan.budget_bytes == budget_bytes
    assert max(callback.peaks) <= budget_bytes * 1.005 < max(counted.peaks)


@slow
def test_a_longer_batch_that_nothing_holds_does_not_end_the_training(tmp_path: Path) -> None:
    callback = assert_same_run(Pictures, tmp_path, "90%", sizes=(8, 64, 8), max_steps=3)
    assert any("under the leanest plan" in line for line in callback.said)


@slow
def test_a_batch_is_planned_for_that_comes_later(tmp_path: Path) -> None:
    plain = run(Pictures, [], tmp_path, sizes=(8, 12, 8))
    longest = next(iter(data_for(Pictures(), (12,))))
    callback = TightfitCallback("90%", batch=longest)
    ours = run(Pictures, [callback], tmp_path, sizes=(8, 12, 8))
    assert same(dict(ours.state_dict()), dict(plain.state_dict())) and callback.plans == 1


@slow
def test_a_run_resumes_from_a_checkpoint(tmp_path: Path) -> None:
    for name, made in (("plain", list), ("ours", lambda: [TightfitCallback("85%")])):
        run(Pictures, made(), tmp_path, max_steps=2).trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
    plain = run(Pictures, [], tmp_path, max_steps=5, ckpt=tmp_path / "plain.ckpt")
    for name in ("plain", "ours"):  # a file of either is read by either
        ours = run(
            Pictures, [callback := TightfitCallback("85%")], tmp_path, max_steps=5, ckpt=tmp_path / f"{name}.ckpt"
        )
        assert ours.losses == plain.losses and len(ours.losses) == 3
        assert same(dict(ours.state_dict()), dict(plain.state_dict())) and callback.plan is not None
    without = run(Pictures, [], tmp_path, max_steps=5, ckpt=tmp_path / "ours.ckpt")
    assert same(dict(without.state_dict()), dict(plain.state_dict()))


class Copies(pl.Callback):
    """Copies the module in the middle of a training, and runs the copy."""

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        with torch.random.fork_rng():
            copied = copy.deepcopy(module)
            copied.loss(next(iter(data_for(module, (2,))))).backward()


OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "averaged weights": (lambda: lightnings.WeightAveraging(use_buffers=True), {}),
    "stochastic averaging": (
        lambda: lightnings.StochasticWeightAveraging(1e-2, swa_epoch_start=1), {"max_steps": -1, "max_epochs": 3}
    ),
    "thawing": (
        lambda: lightnings.BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-3),
        {"max_steps": -1, "max_epochs": 2},
    ),
    "learning rate finder": (
        lambda: lightnings.LearningRateFinder(num_training_steps=3, update_attr=False), {"max_steps": 4}
    ),
    "more accumulation later": (
        lambda: lightnings.GradientAccumulationScheduler({0: 1, 1: 2}), {"max_steps": -1, "max_epochs": 2}
    ),
    "copies": (Copies, {}),
}  # fmt: skip


@slow
@pytest.mark.parametrize("name", OTHERS)
def test_beside_other_callbacks(name: str, tmp_path: Path) -> None:
    other, more = OTHERS[name]
    callback = assert_same_run(Pictures, tmp_path, "90%", lambda: [other()], **more)
    assert callback.plans == (2 if name == "thawing" else 1)


class BackTwice(Pictures):
    def backward(self, loss: torch.Tensor, *_: Any, **__: Any) -> None:
        loss.backward(retain_graph=True)
        (loss * 0.5).backward()


class Steps(Pictures):
    """Steps the optimizer itself, and looks at gradients where Lightning lets it."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.param_groups[0]["lr"] = 1e-3 * (batch_idx + 1)
        optimizer.step(closure=optimizer_closure)

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.losses.append(sum(float(p.grad.sum()) for p in self.parameters() if p.grad is not None))


class Tokenized(Language):
    """Its batches are what a tokenizer gives, in which torch finds no tensors, and it takes them apart."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return BatchEncoding(dict(batch))

    def loss(self, batch: Any) -> torch.Tensor:
        return super().loss({"input_ids": batch.pop("input_ids")})


@slow
@pytest.mark.parametrize("kind", [BackTwice, Steps, Tokenized])
def test_modules_that_do_more_themselves(kind: type[Base], tmp_path: Path) -> None:
    sizes = (4, 4, 8)
    callback = assert_same_run(kind, tmp_path, "90%", lambda: [], sizes=sizes)  # one notes more than its losses
    assert callback.plans == 2


class Heavy(Pictures):
    """So many parameters that the optimizer's step is the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Sequential(  # type: ignore[assignment]
            torch.nn.Linear(8 * 144, 64), *(torch.nn.Linear(64, 64) for _ in range(24)), torch.nn.Linear(64, 5)
        )


@slow
@pytest.mark.parametrize("levers", ["recompute,optimizer_chunks", "recompute,state_in_host"])
def test_levers_of_the_optimizer_inside_its_closure(levers: str, tmp_path: Path) -> None:
    more: dict[str, Any] = {"sizes": (2,) * 5, "max_steps": 5}
    with pytest.raises(BudgetInfeasible) as least:
        run(Heavy, [TightfitCallback(1000, levers=levers)], tmp_path, **more)
    plain = run(Heavy, [], tmp_path, **more)
    # the least is looked for anew with newly measured seconds, and has been four bytes higher
    callback = TightfitCallback(least.value.least_bytes + 256, levers=levers)
    ours = run(Heavy, [callback], tmp_path, **more)
    assert same(dict(ours.state_dict()), dict(plain.state_dict())) and ours.losses == plain.losses
    assert callback.plan is not None and callback.plan.settings
    assert max(callback.peaks) <= callback.plan.budget_bytes * 1.005  # old gradients are not counted twice
    files = [io.BytesIO(), io.BytesIO()]
    for file, module in zip(files, (ours, plain), strict=True):
        torch.save(module.trainer.optimizers[0].state_dict(), file)
    assert same(*(torch.load(io.BytesIO(file.getvalue())) for file in files))


# ------------------------------------------------------------------------------------------------ tracking


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard reads in `folder`: step and value by tag."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = reader.EventAccumulator(str(folder))
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


class Writes(Pictures):
    """Writes to the logger past Lightning, too."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.logger.experiment.add_scalar("own", self.calls, self.calls)  # type: ignore[union-attr]
        return super().training_step(batch, batch_idx)


def test_the_figures_are_in_tensorboards_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    found, callback = [], TightfitCallback("85%")
    for callbacks in ([], [callback]):
        logger = TensorBoardLogger(tmp_path, name=str(len(callbacks)))
        run(Writes, callbacks, tmp_path, logger=logger, log_every_n_steps=2, max_steps=5)
        found.append(events(Path(logger.log_dir)))
    plain, ours = found
    assert {tag: values for tag, values in ours.items() if not tag.startswith("tightfit/")} == plain
    assert len(ours["own"]) == 5 and callback.plan is not None
    peaks = callback.peaks
    expected = [max(peaks[:2]), max(peaks[2:4]), peaks[4]]
    assert [value for _, value in ours["tightfit/peak_bytes"]] == [pytest.approx(each) for each in expected]
    assert [step for step, _ in ours["tightfit/peak_bytes"]][:2] == [step for step, _ in plain["train_loss_step"]]
    for name, value in {
        "predicted_peak_bytes": callback.plan.peak_bytes, "budget_bytes": callback.plan.budget_bytes, "exact": 1.0,
        "predicted_slowdown": callback.plan.slowdown, "gradients_identical": 1.0,
        "recompute_share": callback.plan.recompute_seconds / callback.plan.step_seconds,
    }.items():  # fmt: skip
        assert [seen for _, seen in ours[f"tightfit/{name}"]] == [pytest.approx(value)] * 3, name


# ------------------------------------------------------------------------------------------------ what is refused


def test_a_budget_that_nothing_fits_is_one_line_and_the_module_as_it_was(tmp_path: Path) -> None:
    module, made = Pictures(), []

    class Keeps(pl.Callback):
        def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
            made.append((untouched(module), dict(module.state_dict()), module.losses))

    with pytest.raises(BudgetInfeasible) as caught:
        run(Pictures, [callback := TightfitCallback(1000), Keeps()], tmp_path)
    assert "\n" not in str(caught.value) and "cannot hold this step" in str(caught.value)
    ((clean, state, losses),) = made
    assert clean and losses == [] and same(state, dict(module.state_dict())) and callback.plan is None


class Wrong(subject._Step):
    """A step whose planned backward goes wrong."""

    def _loss(self, output: Any) -> torch.Tensor:
        planned = any(hasattr(m.forward, "__tightfit__") for m in self.modules())
        return super()._loss(output) * (1.5 if planned else 1.0)


def test_a_gradient_that_differs_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "_Step", Wrong)
    with pytest.raises(ReplayDiverged, match="changes the gradients of this module"):
        run(Pictures, [TightfitCallback("85%")], tmp_path)


class Fails(pl.Callback):
    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.during = untouched(module)
        raise KeyError("in the middle")


def test_an_exception_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    kept: list[Any] = []
    fails = Fails()

    class Kept(Pictures):
        def __init__(self) -> None:
            super().__init__()
            kept.append(self)

    with pytest.raises(KeyError, match="in the middle"):
        run(Kept, [TightfitCallback("85%", verify=False), fails], tmp_path)
    assert not fails.during
    assert untouched(kept[0])


def asked(**changes: Any) -> tuple[Any, Any]:
    """A Trainer and a module, as far as `refuse` looks at them."""
    module: Any = Pictures()
    module.automatic_optimization = changes.pop("automatic", True)
    optimizer = changes.pop("optimizer", torch.optim.SGD)(module.parameters())
    parts = {"strategy": "SingleDeviceStrategy", "precision_plugin": "Precision", "profiler": "PassThroughProfiler"}
    made = {name: type(changes.get(name, kind), (), {})() for name, kind in parts.items()}
    made["strategy"].root_device = torch.device("cpu")
    return types.SimpleNamespace(**made, optimizers=[optimizer]), module


class Fetches(Pictures):
    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        return super().training_step(next(dataloader_iter)[0], 0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"strategy": "DDPStrategy"}, "this Trainer has DDPStrategy"),
        ({"strategy": "FSDPStrategy"}, "this Trainer has FSDPStrategy"),
        ({"precision_plugin": "TransformerEnginePrecision"}, "precision plugin TransformerEnginePrecision"),
        ({"automatic": False}, "optimizes by hand"),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS runs the training step as often as it likes"),
        ({"profiler": "PyTorchProfiler"}, "profiler='pytorch' has in use"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(changes: dict[str, Any], named: str) -> None:
    subject.refuse(*asked())
    with pytest.raises(Unsupported) as caught:
        subject.refuse(*asked(**changes))
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_modules_that_cannot_be_served_are_refused(tmp_path: Path) -> None:
    trainer, module = asked()
    with pytest.raises(Unsupported, match="step_in_backward was asked for"):
        subject.refuse(trainer, module, frozenset({Lever.STEP_IN_BACKWARD}))
    with pytest.raises(Unsupported, match="fetches its batches itself"):
        subject.refuse(trainer, Fetches())
    module.backbone.compile()
    with pytest.raises(Unsupported, match=r"is compiled \(backbone\)"):
        subject.refuse(trainer, module)
    whole = Pictures()
    whole._compiler_ctx = {}  # as Lightning notes torch.compile(module)
    with pytest.raises(Unsupported, match=r"is compiled \(it\)"):
        subject.refuse(trainer, whole)


# ------------------------------------------------------------------------------------------- Python's objects


class Meter:
    def __init__(self) -> None:
        self.values, self.best, self.rng = deque([1]), 3.0, random.Random(1)


def test_python_state_is_put_back() -> None:
    numpy = pytest.importorskip("numpy")
    module = Pictures()
    module.meter, module.draw, module.words = Meter(), numpy.random.default_rng(2), {"a"}  # type: ignore[assignment]
    expected = random.Random(1).random(), numpy.random.default_rng(2).random()
    losses = module.losses
    with python_state_kept(module, foreign=lambda kind: False):
        module.losses.append(1.0)
        module.kinds.setdefault("x", []).append(1)
        module.meter.values.append(2)
        module.meter.best, module.meter.rng = 4.0, random.Random(9)
        module.draw.random()
        module.words.add("b")
        module.fresh = 1  # type: ignore[assignment]
    assert module.losses is losses and losses == [] and module.kinds == {} and not hasattr(module, "fresh")
    assert list(module.meter.values) == [1] and module.meter.best == 3.0 and module.words == {"a"}
    assert (module.meter.rng.random(), module.draw.random()) == expected


def test_an_iterator_is_refused() -> None:
    module = Pictures()
    module.stream = itertools.cycle([1, 2])  # type: ignore[assignment]
    with (
        pytest.raises(Unsupported, match=r"Pictures\.stream is an iterator \(cycle\)"),
        python_state_kept(module, foreign=lambda kind: False),
    ):
        pass
