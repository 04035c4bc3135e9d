"""The levers of the optimizer (chunks, in backward, state in host memory): the same bits with any, or a word."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tightfit
from tightfit.core import (
    BudgetInfeasible,
    Category,
    InvalidInput,
    Lever,
    Plan,
    PlanMismatch,
    Trace,
    Unsupported,
    dumps,
    loads,
)
from tightfit.engine import apply
from tightfit.engine.offload import Pool
from tightfit.levers.interface import Given
from tightfit.levers.optimizer_chunks import DEFINITION as CHUNKS
from tightfit.levers.optimizer_step import (
    Waiting,
    by_size,
    in_backward,
    in_chunks,
    not_in_backward,
    state_in_host,
    waiting_bytes,
)
from tightfit.levers.state_in_host import DEFINITION as STATE
from tightfit.levers.step_in_backward import DEFINITION as BACKWARD
from tightfit.levers.step_in_backward.hooks import gradient_norms_kept, is_half_taken
from tightfit.plan import lowest, planning, simulate
from tightfit.plan.account import host_bytes
from tightfit.plan.ways import Way
from tightfit.step.optimizers import Part, _most_slices, _places, refusal, step_parts
from tightfit.step.run import elsewhere
from tightfit.step.snapshot import undisturbed
from tightfit.verify.peak import PEAK_TOLERANCE, PeakMeter, static_bytes
from tightfit.verify.stepped import check_of_optimizer

STEPS = 5


class Tied(nn.Module):
    """Two blocks, dropout, a head that has the embedding's weight, a parameter of one number, a norm."""

    def __init__(self, words: int = 40, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, 4 * width),
                nn.GELU(),
                nn.Dropout(0.1),
                nn.Linear(4 * width, width),
            )
            for _ in range(3)
        )
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(ids)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        logits = self.head(hidden * self.scale)
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())


class Signs(torch.optim.Optimizer):
    """Of no package: momentum of signs, with a counter in the state."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["seen"] = state.get("seen", 0) + 1
                    state.setdefault("m", torch.zeros_like(p)).mul_(0.9).add_(p.grad)
                    p.add_(state["m"].sign(), alpha=-group["lr"] / state["seen"])


class Global(Signs):
    """Its step for one parameter depends on all of them."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        grown = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in grown]).sum()
        for p in grown:
            p.sub_(p.grad / norm)


class Counting(Signs):
    """It counts its steps in the group."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"] / group["steps"])


Make = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, 1e-2, foreach=True),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "sgd-momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-2, foreach=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, 1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, 1e-2, foreach=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "muon": lambda p: torch.optim.Muon([g for g in p if all(each.dim() == 2 for each in g["params"])], 1e-2),
    "tensor-lr": lambda p: torch.optim.AdamW(p, torch.tensor(1e-2)),
    "of-no-package": Signs,
}

LEVERS = {"chunks": [CHUNKS], "backward": [BACKWARD], "host": [STATE], "host-backward": [STATE, BACKWARD]}
SETTINGS = {
    False: {CHUNKS.lever: "2560", BACKWARD.lever: "2560", STATE.lever: "65 2560"},
    True: {CHUNKS.lever: "900 sliced", BACKWARD.lever: "900 sliced", STATE.lever: "65 900 sliced"},
}
#: Their steps are not the same by slices of a parameter.
WHOLE = ("adafactor", "muon")

BLANK = Plan(
    budget_bytes=1, choices=(), status=tightfit.Status.FEASIBLE, peak_bytes=1, step_seconds=1.0, recompute_seconds=0.0,
    bound_seconds=0.0, recompute_flops=0, forward_flops=1, unplanned_peak_bytes=1, replays=0, trace_digest="",
    versions={},
)  # fmt: skip


@contextlib.contextmanager
def in_force(
    model: nn.Module, optimizer: torch.optim.Optimizer, levers: list[Any], sliced: bool = True
) -> Iterator[None]:
    plan = dataclasses.replace(BLANK, settings={each.lever.value: SETTINGS[sliced][each.lever] for each in levers})
    with contextlib.ExitStack() as stack:
        for each in levers:
            stack.enter_context(each.in_force(model, plan, Given(optimizer=optimizer, pool=Pool())))
        yield


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups, with other learning rates."""
    named = dict(model.named_parameters())
    return [
        {"params": [p for n, p in named.items() if p.dim() > 1]},
        {"params": [p for n, p in named.items() if p.dim() <= 1], "lr": 5e-3},
    ]


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state = optimizer.state_dict()
    return {
        **{f"model.{n}": p.detach().clone() for n, p in model.named_parameters()},
        **{f"state.{i}.{k}": v for i, s in state["state"].items() for k, v in s.items()},
        "groups": str(state["param_groups"]),
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        same = torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
        assert same, name


def trained(
    levers: list[Any],
    make: Make,
    *,
    steps: int = STEPS,
    schedule: bool = False,
    hooks: list[str] | None = None,
    sliced: bool = True,
) -> tuple[dict[str, Any], list[float]]:
    torch.manual_seed(0)
    model = Tied()
    optimizer = make(groups_of(model))
    if hooks is not None:
        optimizer.register_step_pre_hook(lambda *_: hooks.append("before"))
        optimizer.register_step_post_hook(lambda *_: hooks.append("after"))
    early = torch.optim.lr_scheduler.StepLR(optimizer, 2) if schedule else None
    losses = []
    with in_force(model, optimizer, levers, sliced):
        late = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (n + 1)) if schedule else None
        for _ in range(steps):
            loss = model(torch.randint(0, 40, (2, 8)))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            for each in (early, late):
                if each is not None:
                    each.step()
            losses.append(loss.item())
    if not schedule:
        assert "step" not in vars(optimizer)
    return everything(model, optimizer), losses


@pytest.mark.parametrize("levers", LEVERS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_same_bits(name: str, levers: str) -> None:
    expected, losses = trained([], OPTIMIZERS[name])
    for sliced in (False, True) if name not in WHOLE else (False,):
        found, planned_losses = trained(LEVERS[levers], OPTIMIZERS[name], sliced=sliced)
        assert planned_losses == losses
        assert_same(found, expected)


@pytest.mark.filterwarnings("error")  # a scheduler warns where it does not see its steps
@pytest.mark.parametrize("levers", LEVERS)
def test_schedulers_and_hooks_see_one_step(levers: str) -> None:
    hooks: list[str] | None = [] if "backward" not in levers else None  # there it would come too late
    expected, _ = trained([], OPTIMIZERS["adamw-foreach"], schedule=True)
    found, _ = trained(LEVERS[levers], OPTIMIZERS["adamw-foreach"], schedule=True, hooks=hooks)
    assert_same(found, expected)
    assert hooks in (None, ["before", "after"] * STEPS)


@pytest.mark.parametrize("levers", LEVERS)
def test_state_is_saved_and_loaded_in_the_middle(levers: str) -> None:
    make = OPTIMIZERS["adamw"]
    torch.manual_seed(0)
    model, batches = Tied(), [torch.randint(0, 40, (2, 8)) for _ in range(4)]
    plain = copy.deepcopy(model)
    reference = make(groups_of(plain))
    for ids in batches:
        torch.manual_seed(1)
        plain(ids).backward()
        reference.step()
        reference.zero_grad()
    first = make(groups_of(model))
    for half in (batches[:2], batches[2:]):
        with in_force(model, first, LEVERS[levers]):
            for ids in half:
                torch.manual_seed(1)
                model(ids).backward()
                first.step()
                first.zero_grad()
            saved = copy.deepcopy(first.state_dict())
        first = make(groups_of(model))
        with in_force(model, first, LEVERS[levers]):
            first.load_state_dict(saved)
    assert_same(everything(model, first), everything(plain, reference))


def waiting(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    found = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return [value for value in found if value in elsewhere]


def test_state_is_saved_without_what_lies_beside_it() -> None:
    torch.manual_seed(0)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters())
    with in_force(model, optimizer, [STATE]):
        model(torch.randint(0, 40, (2, 8))).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert waiting(optimizer)
        for value in waiting(optimizer):
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


def test_loaded_state_that_lies_in_a_larger_storage_waits_too() -> None:
    def stepped(shared: bool) -> tuple[dict[str, Any], int]:
        torch.manual_seed(0)
        model, ids = Tied(), torch.randint(0, 40, (2, 8))
        optimizer = torch.optim.AdamW(model.parameters())
        model(ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        if shared:
            for state in optimizer.state.values():
                whole = torch.stack([state["exp_avg"], state["exp_avg_sq"]])
                state["exp_avg"], state["exp_avg_sq"] = whole[0], whole[1]
        with in_force(model, optimizer, [STATE]):
            count = len(waiting(optimizer))
            model(ids).backward()
            optimizer.step()
        return everything(model, optimizer), count

    (expected, count), (found, shared) = stepped(False), stepped(True)
    assert_same(found, expected)
    assert shared == count > 0


@pytest.mark.parametrize("levers", LEVERS)
def test_a_closure_is_run_before_its_step(levers: str) -> None:
    def run(own: list[Any]) -> tuple[dict[str, Any], list[float]]:
        torch.manual_seed(0)
        model = Tied()
        optimizer, losses = torch.optim.AdamW(groups_of(model), 1e-2), []

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss: torch.Tensor = model(torch.randint(0, 40, (2, 8)))
            loss.backward()
            return loss

        with in_force(model, optimizer, own):
            for _ in range(STEPS):
                losses.append(optimizer.step(closure).item())  # type: ignore[call-overload]
        return everything(model, optimizer), losses

    (expected, losses), (found, planned_losses) = run([]), run(LEVERS[levers])
    assert planned_losses == losses
    assert_same(found, expected)


def test_gradients_of_a_tied_weight_are_summed_in_place() -> None:
    """Autograd would make a third tensor for their sum, since the head's is a view."""
    torch.manual_seed(0)
    model, optimizer = Tied(words=4000, width=64), None
    weight_bytes = model.head.weight.nbytes
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    trace = tightfit.trace(model, IDS, optimizer=optimizer, tiles=False)
    plan = lowest(trace, levers="recompute,step_in_backward")
    assert sum(op.sums_tied for op in trace.ops) == 1 and "step_in_backward" in plan.settings
    static = static_bytes(model, optimizer, IDS)
    assert 2 * weight_bytes < plan.peak_bytes - static < 2.5 * weight_bytes
    assert simulate(trace).peak_bytes - static > 3 * weight_bytes
    with apply(model, plan, optimizer=optimizer), PeakMeter("cpu") as meter:
        model(IDS).backward()
        optimizer.step()
    assert static + meter.rise_bytes == pytest.approx(plan.peak_bytes, rel=1e-3)
    with in_force(model, optimizer, [BACKWARD]):
        assert b"tightfit" not in pickle.dumps(model)  # a copy has nothing of it
    with apply(model, plan, optimizer=optimizer):  # what is to be differentiated again is left as it is
        (gradient,) = torch.autograd.grad(model(IDS), model.head.weight, create_graph=True)
        assert gradient.requires_grad


class Shifted(nn.Module):
    """A head whose weight is the embedding's and a shift: the addition gives both one gradient, which is a view."""

    def __init__(self, words: int = 40, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.head = nn.Module()
        self.head.weight = self.embedding.weight
        self.head.shift = nn.Parameter(torch.zeros(words, width))
        self.head.forward = lambda hidden: nn.functional.linear(hidden, self.head.weight + self.head.shift)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.embedding(ids))
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())


def test_a_gradient_of_two_weights_is_not_each_ones_own() -> None:
    """With Nesterov's momentum the step writes over gradients, which another weight's may not be."""

    def run(own: list[Any]) -> dict[str, Any]:
        torch.manual_seed(0)
        model = Shifted()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, foreach=True)
        with in_force(model, optimizer, own):
            for _ in range(STEPS):
                model(torch.randint(0, 40, (2, 8))).backward()
                optimizer.step()
                optimizer.zero_grad()
        return everything(model, optimizer)

    assert_same(run([BACKWARD]), run([]))


def test_a_step_is_whole_where_its_state_finds_no_room_in_a_folder(tmp_path: Path) -> None:
    """Room is asked for when the state is there, so its parameter has been stepped."""
    plan = dataclasses.replace(BLANK, settings={STATE.lever.value: SETTINGS[True][STATE.lever]})

    def run(gone: Path | None) -> dict[str, Any]:
        torch.manual_seed(0)
        model = Tied()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        with contextlib.ExitStack() as stack:
            if gone is not None:
                gone.mkdir()
                stack.enter_context(STATE.in_force(model, plan, Given(optimizer=optimizer, pool=Pool(spill=gone))))
                gone.rmdir()
                stack.enter_context(pytest.warns(UserWarning, match="cannot spill .* stays on the device"))
            for _ in range(2):
                model(torch.randint(0, 40, (2, 8))).backward()
                optimizer.step()
                optimizer.zero_grad()
        return everything(model, optimizer)

    assert_same(run(tmp_path / "spill"), run(None))


@pytest.mark.parametrize("made", [Global, Counting])
def test_an_optimizer_that_looks_at_all_parameters_is_left_alone(made: Any) -> None:
    assert "other bits" in refusal(made, [{"params": [torch.empty(8, 8), torch.empty(8)], "lr": 0.1}])
    torch.manual_seed(0)
    model = Tied()
    recorded = tightfit.trace(model, torch.zeros(2, 8, dtype=torch.long), optimizer=made(model.parameters()))
    assert recorded.optimizer is not None and "not torch's own" in recorded.optimizer.refused
    assert not recorded.optimizer.in_chunks and "not torch's own" in not_in_backward(recorded)


def test_a_step_that_was_replaced_is_left_alone() -> None:
    model, optimizer = stepping()

    def logged(*args: Any) -> Any:
        return type(optimizer).step(optimizer, *args)

    optimizer.step = logged  # type: ignore[method-assign]
    recorded = tightfit.trace(model, IDS, optimizer=optimizer, tiles=False)
    assert recorded.optimizer is not None and "was replaced" in recorded.optimizer.refused


def test_a_fake_step_tries_it_on_real_tensors() -> None:
    with torch.device("meta"):
        model = Tied(words=400, width=64)
    recorded = tightfit.trace(model, IDS, optimizer=torch.optim.AdamW(model.parameters(), 1e-2), fake=True)
    assert recorded.optimizer is not None and not recorded.optimizer.refused and not not_in_backward(recorded)
    real, optimizer = heavy()
    optimizer.param_groups[0]["foreach"] = False
    twin = tightfit.trace(real, IDS, optimizer=optimizer, tiles=False)
    assert simulate(in_backward(recorded)).peak_bytes == simulate(in_backward(twin)).peak_bytes


def test_slices_are_tried_too() -> None:
    groups = [{"params": [torch.empty(8, 8), torch.empty(8)], "lr": 0.1}]
    assert not refusal(torch.optim.AdamW, groups, sliced=True)
    assert not refusal(torch.optim.Adafactor, groups)
    assert refusal(torch.optim.Adafactor, groups, sliced=True)  # it has sums of rows and columns
    matrix = [{"params": [torch.empty(8, 8)], "lr": 0.1}]
    assert not refusal(torch.optim.Muon, matrix)
    assert refusal(torch.optim.Muon, matrix, sliced=True)  # it looks at all of a matrix
    low = [{"params": [torch.empty(8, 8, dtype=torch.bfloat16)], "lr": 0.1}]
    assert not refusal(torch.optim.SGD, low) and "low precision" in refusal(torch.optim.SGD, low, sliced=True)


def test_trials_draw_nothing_and_a_closure_is_no_trial() -> None:
    before = torch.get_rng_state()
    assert not refusal(torch.optim.AdamW, [{"params": [torch.empty(8, 8), torch.empty(8)], "lr": 0.1}])
    assert torch.equal(torch.get_rng_state(), before)
    assert "cannot be tried" in refusal(torch.optim.LBFGS, [{"params": [torch.empty(8)]}])


# ------------------------------------------------------------------------------------------- what is forbidden


def stepping() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Tied()
    return model, torch.optim.AdamW(model.parameters(), 1e-2)


IDS = torch.arange(16).reshape(2, 8)


def test_accumulation_is_refused_when_it_happens() -> None:
    model, optimizer = stepping()
    with in_force(model, optimizer, [BACKWARD]):
        model(IDS).backward()
        with pytest.raises(Unsupported, match=r"optimizer\.step\(\) after each backward"):
            model(IDS).backward()


def test_a_hook_before_the_step_is_refused() -> None:
    model, optimizer = stepping()
    optimizer.register_step_pre_hook(lambda *_: None)
    with in_force(model, optimizer, [BACKWARD]), pytest.raises(Unsupported, match="register_step_pre_hook"):
        model(IDS).backward()


def test_scaled_losses_are_refused_before_anything_is_stepped() -> None:
    model, optimizer = stepping()
    scaler = torch.amp.GradScaler("cpu")
    with in_force(model, optimizer, [BACKWARD]), pytest.raises(Unsupported, match="GradScaler"):
        scaler.scale(model(IDS)).backward()
    scaler.scale(model(IDS)).backward()


@pytest.mark.parametrize("levers", LEVERS)
def test_groups_that_come_in_the_middle(levers: str) -> None:
    """A state that is loaded puts other groups in the place of those that there were; a group may be added."""

    def run(own: list[Any]) -> dict[str, Any]:
        torch.manual_seed(0)
        model = Tied()
        matrices, others = groups_of(model)
        optimizer = torch.optim.AdamW([matrices], 1e-2)
        with in_force(model, optimizer, own):
            for turn in range(4):
                torch.manual_seed(turn)
                model(IDS).backward()
                optimizer.step()
                optimizer.zero_grad()
                model.zero_grad()
                if turn == 1:
                    optimizer.add_param_group(others)
                    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
                    optimizer.param_groups[0]["lr"] = 0.5
        return everything(model, optimizer)

    assert_same(run(LEVERS[levers]), run([]))


@pytest.mark.parametrize("clip", ["clip_grad_norm_", "clip_grad_value_"])
def test_clipping_by_a_name_that_was_imported_before_is_refused(clip: str) -> None:
    early = getattr(torch.nn.utils, clip)
    model, optimizer = stepping()
    with in_force(model, optimizer, [BACKWARD]):
        model(IDS).backward()
        with pytest.raises(Unsupported, match="finds no gradients"):
            early(model.parameters(), 1.0)
        optimizer.step()
    assert getattr(torch.nn.utils, clip) is early


def test_fits_of_two_optimizers_are_taken_off_in_any_order() -> None:
    before = torch.nn.utils.clip_grad_norm_
    stacks = [contextlib.ExitStack(), contextlib.ExitStack()]
    for stack in stacks:
        stack.enter_context(in_force(*stepping(), [BACKWARD]))
    for stack in stacks:
        stack.close()
    assert torch.nn.utils.clip_grad_norm_ is before


@pytest.mark.parametrize("clip", ["clip_grad_norm_", "clip_grad_value_"])
def test_clipping_is_refused(clip: str) -> None:
    model, optimizer = stepping()
    with in_force(model, optimizer, [BACKWARD]):
        model(IDS).backward()
        with pytest.raises(Unsupported, match=f"{clip} finds no gradients"):
            getattr(torch.nn.utils, clip)(model.parameters(), 1.0)
        optimizer.step()
    model(IDS).backward()
    getattr(torch.nn.utils, clip)(model.parameters(), 1.0)  # the same function as before


def test_a_norm_that_is_only_logged_is_there() -> None:
    model, optimizer = stepping()
    model(IDS).backward()
    expected = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
    optimizer.zero_grad()
    with gradient_norms_kept(), in_force(model, optimizer, [BACKWARD]):
        torch.manual_seed(0)
        stepping()  # the same random numbers for dropout as before
        model(IDS).backward()
        found = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"), norm_type=2.0)
        with pytest.raises(Unsupported, match="finds no gradients"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert torch.equal(found, expected)


def test_a_rate_that_changes_after_backward_is_refused() -> None:
    model, optimizer = stepping()
    with in_force(model, optimizer, [BACKWARD]):
        model(IDS).backward()
        optimizer.param_groups[0]["lr"] = 0.5
        with pytest.raises(Unsupported, match=r"'lr' of the optimizer is 0\.5 at its step"):
            optimizer.step()


def test_a_step_begun_in_backward_is_known() -> None:
    model, optimizer = stepping()
    with in_force(model, optimizer, [BACKWARD]):
        assert not is_half_taken(optimizer)
        model(IDS).backward()
        assert is_half_taken(optimizer)
        optimizer.step()
        assert not is_half_taken(optimizer)


def test_a_plan_without_its_optimizer_is_refused() -> None:
    model, optimizer = stepping()
    for lever in (CHUNKS, BACKWARD, STATE):
        plan = dataclasses.replace(BLANK, settings={lever.lever.value: SETTINGS[True][lever.lever]})
        with pytest.raises(InvalidInput, match="pass optimizer="):
            apply(model, plan)
        with pytest.raises(PlanMismatch):
            lever.under(tightfit.trace(model, IDS), plan)
    assert "step" not in vars(optimizer)


# -------------------------------------------------------------------------------- planned, walked, carried out, proven


def heavy() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Most of its step's bytes are weights, gradients and state."""
    torch.manual_seed(0)
    model = Tied(words=400, width=64)
    return model, torch.optim.AdamW(model.parameters(), 1e-2, foreach=True)


@pytest.fixture(scope="module")
def recorded() -> Trace:
    model, optimizer = heavy()
    return tightfit.trace(model, IDS, optimizer=optimizer, tiles=False)


@pytest.mark.parametrize("rows", [2, 64])
def test_chunks_are_planned_with_where_the_optimizers_step_is_the_fullest(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = heavy()
    trace = tightfit.trace(model, IDS.repeat(rows, 1), optimizer=optimizer, tiles=False)
    planned: list[frozenset[Lever]] = []
    best = planning._best

    def seen(trace: Trace, way: Way, *rest: Any) -> Plan | None:
        planned.append(way.step.levers)
        return best(trace, way, *rest)

    monkeypatch.setattr(planning, "_best", seen)
    low = lowest(trace)
    made = tightfit.plan(trace, low.peak_bytes)
    chunks = [levers for levers in planned if Lever.OPTIMIZER_CHUNKS in levers]
    assert bool(chunks) == (Lever.OPTIMIZER_CHUNKS.value in made.settings) == (rows == 2)
    monkeypatch.setattr(planning, "_that_matter", lambda ways, is_full: list(ways))
    assert lowest(dataclasses.replace(trace)).peak_bytes == low.peak_bytes
    every = tightfit.plan(dataclasses.replace(trace), low.peak_bytes)
    assert every.recompute_seconds == pytest.approx(made.recompute_seconds)


def test_the_referee_walks_each_way(recorded: Trace) -> None:
    whole = simulate(recorded)
    parts, backward = in_chunks(recorded), in_backward(recorded)
    assert simulate(parts).peak_bytes < whole.peak_bytes
    assert simulate(backward).peak_bytes < simulate(parts).peak_bytes
    gradients = simulate(backward).by_category[Category.GRADIENTS.value]
    assert max(gradients) < max(whole.by_category[Category.GRADIENTS.value])
    host = simulate(state_in_host(recorded, Waiting(1))).by_category[Category.OPTIMIZER_STATE.value]
    assert min(host) < whole.by_category[Category.OPTIMIZER_STATE.value][-1] / 10


@pytest.mark.parametrize(
    ("levers", "part"),
    [
        ("optimizer_chunks", 0.9),
        ("step_in_backward", 0.8),
        ("state_in_host", 0.55),
        ("state_in_host,step_in_backward", 0.45),
    ],
)
def test_verify_proves_a_plan(recorded: Trace, levers: str, part: float) -> None:
    model, optimizer = heavy()
    model(IDS).backward()
    optimizer.step()
    optimizer.zero_grad()
    before = everything(model, optimizer)
    plan = tightfit.plan(recorded, f"{part:.0%}", levers=f"recompute,loss_in_place,{levers}")
    assert set(plan.settings) >= set(levers.split(","))
    assert loads(Plan, dumps(plan)) == plan
    proof = tightfit.verify(model, IDS, plan, optimizer=optimizer)
    assert proof.passed, str(proof)
    assert proof["optimizer"].passed and proof["prediction"].passed
    assert_same(everything(model, optimizer), before)


@pytest.mark.parametrize("name", ["nadam", "adagrad", "rmsprop"])
def test_steps_that_read_numbers_of_their_state_are_recorded(name: str) -> None:
    """NAdam divides by what one is more than a number of its state."""
    torch.manual_seed(0)
    model = Tied(words=400, width=64)
    optimizer = OPTIMIZERS[name](model.parameters())
    trace = tightfit.trace(model, IDS, optimizer=optimizer, tiles=False)
    assert trace.optimizer is not None and not trace.optimizer.refused
    plan = lowest(trace, levers="recompute,state_in_host")
    checks = {check.name: check for check in tightfit.verify(model, IDS, plan, optimizer=optimizer).checks}
    assert checks["prediction"].passed and checks["optimizer"].passed, str(checks)


def equal_blocks() -> tuple[nn.Module, torch.optim.Optimizer, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(128, 128) for _ in range(6)))
    return model, torch.optim.AdamW(model.parameters(), 1e-2), torch.randn(4, 128)


@pytest.fixture(scope="module")
def of_equal_blocks() -> Trace:
    model, optimizer, batch = equal_blocks()
    return tightfit.trace(model, batch, loss=_mean_square, optimizer=optimizer, tiles=False)


def _mean_square(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def test_whose_state_waits_is_told_of_equal_parameters_too(of_equal_blocks: Trace) -> None:
    at = of_equal_blocks.optimizer
    assert at is not None
    sizes = [p.size_bytes for part in at.in_chunks for p in part.parameters]
    steps = by_size(at)
    assert len(steps) == len(sizes) == 12
    for count, (waiting, moved_bytes) in enumerate(steps, start=1):
        assert sum(waiting.chosen(sizes)) == count and waiting_bytes(at, waiting) == moved_bytes
        assert Waiting.of(str(waiting)) == waiting
    assert Waiting.of("65") == Waiting(65)  # as plans of before have it
    assert list(Waiting(100, 2, 50).chosen([60, 100, 40, 70, 80])) == [True, True, False, True, False]


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_state_of_some_of_several_equal_parameters_waits(of_equal_blocks: Trace, share: float) -> None:
    allowed = "recompute,state_in_host"
    low, most = lowest(of_equal_blocks, levers=allowed), lowest(of_equal_blocks, levers="recompute,optimizer_chunks")
    budget = int(low.peak_bytes + share * (most.peak_bytes - low.peak_bytes))
    plan = tightfit.plan(of_equal_blocks, budget, levers=allowed)
    waits, all_waits = (host_bytes(of_equal_blocks, each)["state_in_host"] for each in (plan, low))
    assert 0 < waits < all_waits and of_equal_blocks.optimizer is not None
    fewer = [waiting for waiting, moved_bytes in by_size(of_equal_blocks.optimizer) if moved_bytes < waits]
    assert len(fewer) in (2, 3, 4)  # of six blocks; and one block less would be too much for the device
    assert simulate(state_in_host(of_equal_blocks, fewer[-1])).peak_bytes > budget
    assert plan.other_seconds == pytest.approx(low.other_seconds * waits / all_waits)
    model, optimizer, batch = equal_blocks()
    proof = tightfit.verify(model, batch, plan, loss=_mean_square, optimizer=optimizer)
    assert proof["optimizer"].passed and proof["peak"].passed, str(proof)
    measured_bytes = int(proof["prediction"].measured.split("(")[1].split(" ")[0])
    assert abs(measured_bytes / plan.peak_bytes - 1) < 1e-3
    limit = all_waits // 2 + 1  # half of them, and no more
    limited = lowest(of_equal_blocks, levers=allowed, host_budget=limit)
    assert all_waits / 3 < host_bytes(of_equal_blocks, limited)["state_in_host"] <= limit


def test_a_wrong_step_is_found(recorded: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the optimizer is not one that passes whatever is stepped."""
    model, optimizer = heavy()
    plan = tightfit.plan(recorded, "80%", levers="recompute,step_in_backward")

    def lazy(given: torch.optim.Optimizer, parts: Any) -> None:
        step_parts(given, [part for part in parts if part.parameters[0].dim() != 0])

    monkeypatch.setattr("tightfit.levers.step_in_backward.hooks.step_parts", lazy)
    with undisturbed(model, IDS) as restart:
        check = check_of_optimizer(model, IDS, plan, None, optimizer, restart)
    assert not check.passed and "scale" in check.measured


def test_fit_uses_them_and_leaves_nothing_behind() -> None:
    def run(fitted: bool) -> tuple[dict[str, Any], list[float]]:
        model, optimizer = heavy()
        applied = None
        if fitted:
            with pytest.raises(BudgetInfeasible):
                tightfit.fit(model, IDS, "45%", optimizer=optimizer, exact=True)
            applied = tightfit.fit(
                model, IDS, "45%", optimizer=optimizer, exact=True, beside="step_in_backward, state_in_host"
            )
            assert {Lever.STEP_IN_BACKWARD.value, Lever.STATE_IN_HOST.value} <= set(applied.plan.settings)
        torch.manual_seed(3)
        losses = []
        for _ in range(10):
            loss = model(IDS)
            loss.backward()
            if fitted:
                assert all(p.grad is None for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        if applied is not None:
            applied.remove()
            assert "step" not in vars(optimizer)
            assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
        return everything(model, optimizer), losses

    expected, losses = run(False)
    found, planned = run(True)
    assert planned == losses
    assert_same(found, expected)


def test_what_would_fit_is_said() -> None:
    model, optimizer = heavy()
    with pytest.raises(BudgetInfeasible, match=r"beside=.state_in_host,gradients_in_host. would take"):
        tightfit.fit(model, IDS, "45%", optimizer=optimizer, exact=True)


def test_parts_step_what_has_a_gradient() -> None:
    model, optimizer = stepping()
    model(IDS).backward()
    model.scale.grad = None
    before = model.scale.detach().clone()
    step_parts(optimizer, [Part(g, [p]) for g in optimizer.param_groups for p in g["params"]])
    assert torch.equal(model.scale, before) and len(optimizer.param_groups[0]["params"]) == len(
        list(model.parameters())
    )


class Experts(nn.Module):
    """Their weights are one parameter, whose first dimension is short."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(4, 128, 256) / 16), nn.Parameter(torch.randn(4, 256, 128) / 16)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.bmm(nn.functional.gelu(torch.bmm(rows.expand(4, -1, -1), self.up)), self.down).sum(0)


@pytest.mark.parametrize("shape", [(7,), (10, 3), (4, 9, 5), (2, 3, 4, 5), (3, 8, 1)])
@pytest.mark.parametrize("slices", [1, 2, 3, 5, 8, 100])
def test_slices_cover_a_parameter_once(shape: tuple[int, ...], slices: int) -> None:
    whole = torch.zeros(shape)
    most = _most_slices(whole)
    places = list(_places(shape, min(slices, most)))
    for place in places:
        assert (whole[place].dim() == whole.dim() and whole[place].numel() > 1) or whole.dim() == 1
        whole[place] += 1
    assert bool((whole == 1).all())
    assert min(slices, most) <= len(places) <= 2 * min(slices, most)


@pytest.mark.parametrize("block", [None, Experts])
@pytest.mark.parametrize("lever", [Lever.OPTIMIZER_CHUNKS, Lever.STATE_IN_HOST])
def test_the_first_step_makes_the_state_within_the_budget(lever: Lever, block: Any) -> None:
    torch.manual_seed(0)

    def dense() -> nn.Module:
        return nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128))

    model = nn.Sequential(*((block or dense)() for _ in range(4)))
    optimizer, batch, levers = torch.optim.AdamW(model.parameters()), torch.randn(2, 128), (Lever.RECOMPUTE, lever)

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).square().mean()

    with pytest.raises(BudgetInfeasible) as least:
        tightfit.fit(model, batch, 1000, loss=loss, optimizer=optimizer, levers=levers)
    budget = least.value.least_bytes
    applied = tightfit.fit(model, batch, budget, loss=loss, optimizer=optimizer, levers=levers)
    try:
        for _ in range(2):
            before_bytes = static_bytes(model, optimizer, batch)
            with PeakMeter(torch.device("cpu")) as meter:
                loss(model, batch).backward()
                optimizer.step()
            assert before_bytes + meter.rise_bytes <= budget * (1 + PEAK_TOLERANCE)
            optimizer.zero_grad()
    finally:
        applied.remove()
