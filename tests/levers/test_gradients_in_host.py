"""Gradients in host memory: the same bits where they are accumulated and clipped, and the peak that was said."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.levers.test_optimizer import BLANK, IDS, OPTIMIZERS, Tied, assert_same, everything, groups_of, heavy
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils._python_dispatch import TorchDispatchMode

import tightfit
from tightfit.core import Category, InvalidInput, Lever, Plan, PlanMismatch, Trace, Unsupported, dumps, loads
from tightfit.engine import apply
from tightfit.engine.offload import Pool
from tightfit.fitting.micro_batches import gradients_in_place
from tightfit.levers.gradients_in_host import DEFINITION as GRADIENTS
from tightfit.levers.gradients_in_host.host import _Room
from tightfit.levers.interface import Given
from tightfit.levers.optimizer_step import gradients_in_host, gradients_stay, waiting_gradients
from tightfit.levers.state_in_host import DEFINITION as STATE
from tightfit.levers.step_in_backward import DEFINITION as BACKWARD
from tightfit.plan import lowest, simulate
from tightfit.plan.account import host_bytes
from tightfit.step.run import elsewhere, is_elsewhere
from tightfit.verify.peak import PeakMeter, static_bytes
from tightfit.verify.stepped import check_of_optimizer

NAME = Lever.GRADIENTS_IN_HOST.value
STEPS, PARTS = 10, 3
SETTINGS = {GRADIENTS.lever: "65 900 sliced", STATE.lever: "65 900 sliced", BACKWARD.lever: "900 sliced"}


@contextlib.contextmanager
def in_force(
    model: nn.Module, optimizer: torch.optim.Optimizer, levers: list[Any], pool: Pool | None = None
) -> Iterator[None]:
    plan = dataclasses.replace(BLANK, settings={each.lever.value: SETTINGS[each.lever] for each in levers})
    with contextlib.ExitStack() as stack:
        for each in levers:
            stack.enter_context(each.in_force(model, plan, Given(optimizer=optimizer, pool=pool or Pool())))
        yield


def trained(
    levers: list[Any], name: str = "adamw-foreach", *, clip: str = "norm", to_none: bool = True, parts: int = PARTS
) -> tuple[dict[str, Any], list[float]]:
    """Ten steps of several backwards each, clipped so far that all of them are."""
    torch.manual_seed(0)
    model = Tied()
    optimizer, seen = OPTIMIZERS[name](groups_of(model)), []
    with in_force(model, optimizer, levers):
        for _ in range(STEPS):
            for _ in range(parts):
                loss = model(torch.randint(0, 40, (2, 8))) / parts
                loss.backward()
                seen.append(loss.item())
            if levers:
                assert sum(is_elsewhere(p.grad) for p in model.parameters() if p.grad is not None) > 5
            if clip == "norm":
                seen.append(clip_grad_norm_(model.parameters(), 0.1).item())
            elif clip == "value":
                clip_grad_value_(model.parameters(), 1e-3)
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
    assert not any(is_elsewhere(p.grad) for p in model.parameters() if p.grad is not None)
    return everything(model, optimizer), seen


@pytest.mark.parametrize("levers", [[GRADIENTS], [GRADIENTS, STATE]], ids=["gradients", "gradients-state"])
@pytest.mark.parametrize("name", ["adamw", "adamw-foreach", "adamw-fused", "sgd-momentum", "rmsprop", "tensor-lr"])
def test_the_same_bits_where_gradients_are_accumulated_and_clipped(name: str, levers: list[Any]) -> None:
    expected, losses = trained([], name)
    found, planned = trained(levers, name)
    assert planned == losses
    assert_same(found, expected)


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("clip", ["norm", "value", "no"])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_same_bits_with_other_loops(to_none: bool, clip: str, parts: int) -> None:
    expected, losses = trained([], clip=clip, to_none=to_none, parts=parts)
    found, planned = trained([GRADIENTS], clip=clip, to_none=to_none, parts=parts)
    assert planned == losses
    assert_same(found, expected)


def stepping() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Tied()
    return model, torch.optim.AdamW(model.parameters(), 1e-2)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
@pytest.mark.parametrize("foreach", [None, True, False])
def test_norms_and_what_is_clipped_are_torchs(norm_type: float, foreach: bool | None) -> None:
    def clipped(levers: list[Any]) -> list[torch.Tensor]:
        model, optimizer = stepping()
        torch.manual_seed(1)
        with in_force(model, optimizer, levers):
            model(IDS).backward()
            total = clip_grad_norm_(model.parameters(), 0.05, norm_type, foreach=foreach)
            again = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()], norm_type, foreach=foreach)
            return [total, again, *(p.grad.clone() for p in model.parameters())]

    assert all(map(torch.equal, clipped([GRADIENTS]), clipped([])))


def test_a_norm_that_is_no_number_is_an_error_where_it_is_one() -> None:
    model, optimizer = stepping()
    with in_force(model, optimizer, [GRADIENTS]):
        model(IDS).backward()
        model.embedding.weight.grad[0, 0] = float("inf")
        with pytest.raises(RuntimeError, match="non-finite"):
            clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)


def test_readers_between_backward_and_step_find_the_right_numbers() -> None:
    model, optimizer = stepping()
    plain, _ = stepping()
    torch.manual_seed(1)
    plain(IDS).backward()
    seen: list[torch.Tensor] = []
    optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad.clone() for p in model.parameters()))
    with in_force(model, optimizer, [GRADIENTS]):
        torch.manual_seed(1)
        model(IDS).backward()
        optimizer.step()
    assert all(map(torch.equal, seen, (p.grad for p in plain.parameters())))


def test_gradients_that_only_are_asked_for_go_back() -> None:
    """`torch.autograd.grad` runs the hooks of a parameter, and adds nothing to its gradient."""
    model, optimizer = stepping()
    with in_force(model, optimizer, [GRADIENTS]):
        model(IDS).backward()
        before = [p.grad.clone() for p in model.parameters()]
        torch.autograd.grad(model(IDS), list(model.parameters()))
        large = [p for p in model.parameters() if p.numel() * 4 >= 65]
        assert sum(not is_elsewhere(p.grad) for p in large) <= 1
        assert all(map(torch.equal, before, (p.grad for p in model.parameters())))


def test_a_gradient_that_a_loop_keeps_is_not_written_over() -> None:
    model, optimizer = stepping()
    weight = model.blocks[0][1].weight
    with in_force(model, optimizer, [GRADIENTS]):
        model(IDS).backward()
        kept, seen = weight.grad.view(-1), weight.grad.clone().view(-1)
        for _ in range(2):
            optimizer.zero_grad()
            model(IDS).backward()
            assert is_elsewhere(weight.grad) and torch.equal(kept, seen)
    assert torch.equal(kept, seen)


def test_room_is_used_again_and_given_back() -> None:
    model, optimizer = stepping()
    pool = Pool()
    for _ in range(2):
        with in_force(model, optimizer, [GRADIENTS], pool):
            taken_bytes = 0
            for _ in range(4):
                model(IDS).backward()
                clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
                taken_bytes = taken_bytes or pool.taken_bytes
                assert pool.taken_bytes == taken_bytes
        assert pool.stored_bytes == 0


def test_room_that_a_loop_holds_for_long_is_given_back() -> None:
    """A loop that keeps its gradients until the next step's has two sets of rooms, and not one more each step."""
    model, optimizer = stepping()
    pool = Pool()
    with in_force(model, optimizer, [GRADIENTS], pool):
        taken = []
        for _ in range(6):
            model(IDS).backward()
            gradients = [p.grad for p in model.parameters()]
            optimizer.step()
            optimizer.zero_grad()
            taken.append(pool.stored_bytes)
        assert taken[2:] == [taken[1]] * 4 and taken[1] <= 2 * taken[0]
        del gradients
    assert pool.stored_bytes == 0


def test_gradients_in_one_flat_buffer_stay() -> None:
    """Whoever writes to the buffer writes to the gradients."""

    def flat(levers: list[Any]) -> tuple[dict[str, Any], list[float]]:
        model, optimizer = stepping()
        buffer, at, norms = torch.zeros(sum(p.numel() for p in model.parameters())), 0, []
        for parameter in model.parameters():
            parameter.grad = buffer[at : at + parameter.numel()].view_as(parameter)
            at += parameter.numel()
        with in_force(model, optimizer, levers):
            for _ in range(3):
                model(IDS).backward()
                norms.append(float(buffer.norm()))
                buffer.mul_(0.1)
                optimizer.step()
                buffer.zero_()
        return everything(model, optimizer), norms

    expected, norms = flat([])
    found, planned = flat([GRADIENTS])
    assert planned == norms and min(norms) > 0
    assert_same(found, expected)


def test_a_view_that_is_there_before_the_gradient_goes_keeps_it_on_the_device() -> None:
    model, optimizer = stepping()
    weight = model.blocks[0][1].weight
    model(IDS).backward()
    view = weight.grad.detach()
    with in_force(model, optimizer, [GRADIENTS]):
        assert not is_elsewhere(weight.grad)
        view.mul_(0.5)
        assert torch.equal(view, weight.grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        model(IDS).backward()
        assert torch.equal(view, weight.grad) and weight.grad.any()
        del view
        model(IDS).backward()
        assert is_elsewhere(weight.grad)


@pytest.mark.parametrize("when", ["backward", "step", "clip"])
def test_a_view_of_what_waits_is_refused_when_it_is_needed(when: str) -> None:
    model, optimizer = stepping()
    weight = model.blocks[0][1].weight
    with in_force(model, optimizer, [GRADIENTS]):
        model(IDS).backward()
        view = weight.grad.detach()
        view.mul_(0.5)
        with pytest.raises(Unsupported, match=r"view of the gradient of blocks\.0\.1\.weight.*\.clone\(\)"):
            if when == "backward":
                model(IDS).backward()
            elif when == "step":
                optimizer.step()
            else:
                clip_grad_norm_(model.parameters(), 0.01)
        del view
        optimizer.step()


def test_a_view_of_what_waits_is_told_at_the_end() -> None:
    model, optimizer = stepping()
    with pytest.warns(UserWarning, match="views of the gradients of 1 parameters"):  # noqa: SIM117 - the inner ends first
        with in_force(model, optimizer, [GRADIENTS]):
            model(IDS).backward()
            view = model.blocks[0][1].weight.grad[0]
    assert view.any()


def test_a_full_pool_leaves_gradients_on_the_device() -> None:
    model, optimizer = stepping()
    with in_force(model, optimizer, [GRADIENTS], Pool(4096 * 3)):
        model(IDS).backward()
        assert sum(is_elsewhere(p.grad) for p in model.parameters()) == 3
        optimizer.step()


def test_gradients_that_were_there_go_and_come_back() -> None:
    model, optimizer = stepping()
    model(IDS).backward()
    before = {p: (p.grad, p.grad.clone()) for p in model.parameters()}
    with in_force(model, optimizer, [GRADIENTS]):
        assert sum(map(is_elsewhere, (p.grad for p in model.parameters()))) > 5
    for parameter, (gradient, value) in before.items():
        assert parameter.grad is gradient and torch.equal(gradient, value) and not is_elsewhere(gradient)


def test_scaled_losses_are_refused() -> None:
    model, optimizer = stepping()
    scaler = torch.amp.GradScaler("cpu")
    with in_force(model, optimizer, [GRADIENTS]), pytest.raises(Unsupported, match="GradScaler"):
        scaler.scale(model(IDS)).backward()
    scaler.scale(model(IDS)).backward()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_torchs_functions_come_back_in_any_order(order: tuple[int, int]) -> None:
    """`step_in_backward` of another model replaces some of them too."""
    names = ("clip_grad_value_", "get_total_norm", "clip_grad_norm_")
    before = [getattr(torch.nn.utils, name) for name in names]
    scale = torch.amp.GradScaler.scale
    stacks = [contextlib.ExitStack(), contextlib.ExitStack()]
    for stack, lever in zip(stacks, (GRADIENTS, BACKWARD), strict=True):
        stack.enter_context(in_force(*stepping(), [lever]))
    stacks[order[0]].close()
    assert (torch.nn.utils.clip_grad.clip_grad_norm_ is before[2]) == (order[0] == 1)
    model, optimizer = stepping()
    model(IDS).backward()
    expected = copy.deepcopy([p.grad for p in model.parameters()])
    stacks[order[1]].close()
    clip_grad_norm_(model.parameters(), 1e9)
    torch.amp.GradScaler("cpu").scale(torch.ones(()))  # what may be left of them refuses nothing
    assert all(map(torch.equal, expected, (p.grad for p in model.parameters())))
    with in_force(model, optimizer, [GRADIENTS]):
        pass
    if order == (1, 0):
        assert [getattr(torch.nn.utils, name) for name in names] == before and torch.amp.GradScaler.scale is scale


def test_a_plan_without_its_optimizer_is_refused() -> None:
    model, _ = stepping()
    plan = dataclasses.replace(BLANK, settings={NAME: SETTINGS[GRADIENTS.lever]})
    with pytest.raises(InvalidInput, match="pass optimizer="):
        apply(model, plan)
    recorded = tightfit.trace(model, IDS)
    assert "no optimizer's step" in gradients_stay(recorded)
    with pytest.raises(PlanMismatch, match="which this step cannot: the trace has no optimizer's step"):
        GRADIENTS.under(recorded, plan)


# -------------------------------------------------------------------------------- planned, walked, carried out, proven


@pytest.fixture(scope="module")
def recorded() -> dict[bool, Trace]:
    """The step, and the same one that finds gradients."""
    found = {}
    for accumulates in (False, True):
        model, optimizer = heavy()
        with gradients_in_place(model, accumulates):
            found[accumulates] = tightfit.trace(model, IDS, optimizer=optimizer)
    return found


@pytest.mark.parametrize("accumulates", [False, True])
def test_the_referee_walks_it(recorded: dict[bool, Trace], accumulates: bool) -> None:
    trace = recorded[accumulates]
    weights = trace.static_bytes[Category.PARAMETERS.value]
    whole = simulate(trace).by_category[Category.GRADIENTS.value]
    line = simulate(gradients_in_host(trace, 1)).by_category[Category.GRADIENTS.value]
    assert max(whole) == weights and min(line) == 0 and max(line) < 0.6 * weights  # the embedding's, the largest
    assert waiting_gradients(trace, 1) == (weights, weights if accumulates else 0)
    assert simulate(gradients_in_host(trace, 10**9)).by_category[Category.GRADIENTS.value][-1] == weights


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("levers", [NAME, f"{NAME},state_in_host"])
def test_verify_proves_a_plan(recorded: dict[bool, Trace], levers: str, accumulates: bool) -> None:
    model, optimizer = heavy()
    plan = lowest(recorded[accumulates], levers=f"recompute,{levers}")
    assert set(plan.settings) == set(levers.split(","))
    assert loads(Plan, dumps(plan)) == plan
    assert host_bytes(recorded[accumulates], plan)[NAME] == sum(p.nbytes for p in model.parameters())
    with gradients_in_place(model, accumulates):
        proof = tightfit.verify(model, IDS, plan, optimizer=optimizer)
    assert proof.passed, str(proof)
    measured_bytes = int(proof["prediction"].measured.split("(")[1].split(" ")[0])
    assert abs(measured_bytes / plan.peak_bytes - 1) < 1e-3
    assert not any(p._post_accumulate_grad_hooks or p._backward_hooks for p in model.parameters())


def test_a_wrong_gradient_is_found(recorded: dict[bool, Trace], monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the optimizer is not one that passes whatever comes back."""
    model, optimizer = heavy()
    plan = lowest(recorded[False], levers=f"recompute,{NAME}")
    monkeypatch.setattr(_Room, "further_holders", lambda self: 0)
    monkeypatch.setattr("tightfit.levers.gradients_in_host.host.laid_out_like", _one_for_all())
    from tightfit.step.snapshot import undisturbed

    with undisturbed(model, IDS) as restart:
        check = check_of_optimizer(model, IDS, plan, None, optimizer, restart)
    assert not check.passed and "gradient of" in check.measured


def _one_for_all() -> Any:
    """Every gradient has the same room."""
    shared = torch.zeros(1 << 20)
    return lambda tensor, buffer: shared.as_strided(tensor.shape, tensor.stride())


@pytest.mark.parametrize("part", [0.9, 0.8])
def test_a_plan_with_room_left_moves_fewer(recorded: dict[bool, Trace], part: float) -> None:
    trace = recorded[True]
    budget = int(part * simulate(trace).peak_bytes)
    plan = tightfit.plan(trace, budget, levers=f"recompute,{NAME}")
    whole = lowest(trace, levers=f"recompute,{NAME}")
    assert plan.peak_bytes == simulate(trace, plan).peak_bytes <= budget
    assert 0 < host_bytes(trace, plan)[NAME] < host_bytes(trace, whole)[NAME]
    assert 0 < plan.other_seconds < whole.other_seconds


def test_a_host_budget_is_kept(recorded: dict[bool, Trace]) -> None:
    trace = recorded[True]
    most = host_bytes(trace, lowest(trace, levers=f"recompute,{NAME}"))[NAME]
    for limit in (most, most - 1, 0):
        plan = lowest(trace, levers=f"recompute,{NAME}", host_budget=limit)
        assert sum(host_bytes(trace, plan).values()) <= limit


@pytest.mark.slow
def test_micro_batches_are_fitted_with_it() -> None:
    """Ten steps of a global batch, within a budget that no plan of activations holds, each measured."""

    def run(beside: str) -> tuple[dict[str, Any], list[float], int]:
        model, optimizer = heavy()
        rows = torch.randint(0, 400, (6, 8))
        applied = tightfit.fit(model, rows, budget, optimizer=optimizer, beside=beside, micro_batch=2, max_norm=0.1)
        torch.manual_seed(3)
        losses, most = [], 0
        for turn in range(STEPS):
            before_bytes = static_bytes(model, optimizer, rows)
            with PeakMeter("cpu") as meter:
                losses.append(applied.backward(rows).item())
                losses.append(float(applied.total_norm))
                optimizer.step()
            most = max(most, before_bytes + meter.rise_bytes) if turn else 0
            optimizer.zero_grad()
        plan = applied.plan
        assert (NAME in plan.settings) == (NAME in beside)
        applied.remove()
        assert not beside or most <= plan.budget_bytes
        return everything(model, optimizer), losses, plan.peak_bytes

    budget: str | int = "100%"
    expected, losses, peak_bytes = run("")
    budget = int(0.45 * peak_bytes)
    with pytest.raises(tightfit.BudgetInfeasible, match=NAME):
        run("")
    found, planned, _ = run(f"{NAME},state_in_host")
    assert planned == losses
    assert_same(found, expected)


def test_each_micro_batch_has_the_peak_that_was_said() -> None:
    model, optimizer = heavy()
    rows = torch.randint(0, 400, (6, 8))
    applied = tightfit.fit(model, rows, 1_200_000, optimizer=optimizer, beside=f"{NAME},state_in_host", micro_batch=2)
    assert NAME in applied.plan.settings and applied.plan.peak_bytes < 1_200_000
    found = []
    for _ in range(2):
        for part, weight in applied.parts(rows):
            before_bytes = static_bytes(model, optimizer, rows)
            with PeakMeter("cpu") as meter:
                (model(part) * weight).backward()
            found.append(before_bytes + meter.rise_bytes)
        clip_grad_norm_(model.parameters(), 0.1)
        before_bytes = static_bytes(model, optimizer, rows)
        with PeakMeter("cpu") as meter:
            optimizer.step()
        found.append(before_bytes + meter.rise_bytes)
        optimizer.zero_grad()
    predicted_bytes = applied.plan.peak_bytes
    applied.remove()
    assert abs(max(found) / predicted_bytes - 1) < 1e-3, (found, predicted_bytes)


def test_a_loop_that_accumulates_by_itself() -> None:
    """The second micro-batch finds gradients, and is planned anew; then the optimizer steps with both."""

    def run(beside: str) -> tuple[dict[str, Any], list[float]]:
        model, optimizer = heavy()
        applied = tightfit.fit(model, IDS, "75%", optimizer=optimizer, beside=beside) if beside else None
        torch.manual_seed(3)
        losses = []
        for _ in range(STEPS):
            for _ in range(PARTS):
                loss = model(IDS)
                loss.backward()
                losses.append(loss.item())
            clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        if applied is not None:
            assert NAME in applied.plan.settings
            applied.remove()
        return everything(model, optimizer), losses

    expected, losses = run("")
    found, planned = run(NAME)
    assert planned == losses
    assert_same(found, expected)


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lever", [STATE, GRADIENTS], ids=lambda lever: lever.lever.value)
def test_what_is_brought_back_is_no_op_of_whoever_runs(lever: Any) -> None:
    """A plan that was dropped is left by Python's collector, which may run in the forward of a unit of another model.
    What it copies there was recorded as the unit's own, and its backward stopped: ReplayDiverged."""
    model, optimizer = heavy()
    model(IDS).backward()
    optimizer.step()
    with contextlib.ExitStack() as stack:
        stack.enter_context(in_force(model, optimizer, [lever]))
        waits = [p.grad for p in model.parameters()] + [v for s in optimizer.state.values() for v in s.values()]
        assert any(is_elsewhere(each) or each in elsewhere for each in waits if isinstance(each, torch.Tensor))
        with _Seen() as seen:
            stack.close()
    assert seen.ops == []
