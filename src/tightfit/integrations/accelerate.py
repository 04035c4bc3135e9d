"""Models that accelerate has spread over devices (`device_map`), each device with a budget of its own.

Idea: a value belongs to the device of the unit that makes it. Seen from one device, a step is the whole step with the
values of all others weighing nothing; a plan of that trace for the device's budget recomputes only what helps there.
The plans are joined unit by unit, and the joined plan is refereed on each device's trace again.

Weights that rest on disk are read when their module runs; they are no static bytes. accelerate's hooks stay where they
are: a planned unit runs inside them.

Invariant: what is applied was simulated on every device and holds every budget. Refused: trainable weights on disk
(accelerate gives them no gradient, without a word), a budget for a device that runs nothing, a device without one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tightfit.accelerator import HOST, is_card, numbered
from tightfit.core import BudgetInfeasible, Category, InvalidInput, Op, Plan, Status, Trace, Unsupported, Value
from tightfit.engine import Applied
from tightfit.plan import plan as make_plan
from tightfit.plan import simulate
from tightfit.step.modules import UnitsAsked, find_units
from tightfit.step.optimizers import bare
from tightfit.step.run import LossFunction, tensors_in, unique_bytes
from tightfit.trace.recording import trace

__all__ = ["device_traces", "execution_devices", "fit", "plan"]

_MOVES = ("aten._to_copy.default", "aten.copy_.default")


def fit(
    model: nn.Module,
    batch: Any,
    budget: str | int | Mapping[str | int | torch.device, str | int],
    loss: LossFunction | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    units: UnitsAsked = None,
) -> Applied:
    """Trace one step of a `device_map` model, plan it for the budget of each device, apply the plan.

    `budget`: by device as accelerate names them (`0`, `"cuda:1"`, `"cpu"`), or one for every device that runs anything.
    A percentage is of that device's own unplanned peak. Raises what `tightfit.fit` does.
    """
    asleep = [name for name, p in model.named_parameters() if p.is_meta and p.requires_grad]
    if asleep:
        raise Unsupported(
            f"{len(asleep)} trainable parameters rest on disk (first: {asleep[0]}), where they never get a gradient: "
            "freeze them, or give their module a device in the device_map"
        )
    devices = execution_devices(model, units)
    recorded = trace(model, batch, loss=loss, optimizer=optimizer, units=list(devices))
    traces = device_traces(recorded, devices, _static_bytes(model, batch, optimizer, devices))
    return Applied(model, plan(recorded, traces, _budgets(budget, list(traces)), devices), recorded)


def execution_devices(model: nn.Module, units: UnitsAsked = None) -> dict[str, str]:
    """Path of each unit to the device that it runs on, in the order of the model."""
    found = {}
    for path, module in find_units(model, units).items():
        device = _hook_device(module)
        if device is None:
            device = next((p.device for p in module.parameters() if not p.is_meta), HOST)
        found[path] = _named(device)
    return found


def _hook_device(module: nn.Module) -> Any:
    for each in module.modules():
        hook = getattr(each, "_hf_hook", None)
        for part in (hook, *getattr(hook, "hooks", ())):
            device = getattr(part, "execution_device", None)
            if device is not None and not isinstance(device, Mapping):
                return device
    return None


def _named(device: str | int | torch.device) -> str:
    if isinstance(device, int) or (isinstance(device, str) and device.isdigit()):
        return str(numbered(int(device)))
    made = torch.device(device)
    return f"{made.type}:0" if is_card(made) and made.index is None else str(made)


def _budgets(budget: Any, devices: list[str]) -> dict[str, str | int]:
    if not isinstance(budget, Mapping):
        return dict.fromkeys(devices, budget)
    given = {_named(device): size for device, size in budget.items()}
    if unused := [device for device in given if device not in devices]:
        raise InvalidInput(f"a budget for {unused[0]}, but the model runs on {', '.join(devices)} only")
    if missing := [device for device in devices if device not in given]:
        raise InvalidInput(f"no budget for {missing[0]}, on which the model runs too: give one for each device")
    return given


def _static_bytes(
    model: nn.Module, batch: Any, optimizer: Any, devices: Mapping[str, str]
) -> dict[str, dict[str, int]]:
    """By device and category. Weights on disk (`meta`) weigh nothing while nothing runs."""
    state = [] if optimizer is None else tensors_in([list(s.values()) for s in bare(optimizer).state.values()])
    parameters = list(model.parameters())
    kinds: dict[str, list[torch.Tensor]] = {
        Category.PARAMETERS.value: [p.data for p in parameters],
        Category.GRADIENTS.value: [p.grad for p in parameters if p.grad is not None],
        Category.BUFFERS.value: list(model.buffers()),
        Category.INPUTS.value: tensors_in(batch),
        Category.OPTIMIZER_STATE.value: state,
    }
    return {
        device: {
            kind: unique_bytes(t for t in tensors if not t.is_meta and _named(t.device) == device)
            for kind, tensors in kinds.items()
        }
        for device in dict.fromkeys(devices.values())
    }


def device_traces(
    recorded: Trace, devices: Mapping[str, str], static_bytes: Mapping[str, Mapping[str, int]]
) -> dict[str, Trace]:
    """The step as each device sees it: the values of the others weigh nothing. `devices`: by unit."""
    places = _places(recorded, devices)
    found = {}
    for device in dict.fromkeys(devices.values()):
        here = {value for value, place in places.items() if place == device}
        found[device] = dataclasses.replace(
            recorded,
            units=tuple(
                unit if devices[unit.path] == device else dataclasses.replace(unit, digest=f"{unit.digest}@elsewhere")
                for unit in recorded.units
            ),
            values=tuple(v if v.id in here else dataclasses.replace(v, size_bytes=0) for v in recorded.values),
            ops=tuple(
                op if any(o in here for o in (*op.outputs, *op.inputs)) else dataclasses.replace(op, scratch_bytes=0)
                for op in recorded.ops
            ),
            static_bytes=dict(static_bytes[device]),
            optimizer=None,  # it steps on all devices, and one device's plan cannot say how
            device=device,
            digest=f"{recorded.digest}@{device}",
        )
    return found


def _places(recorded: Trace, devices: Mapping[str, str]) -> dict[int, str]:
    """Device of each value: its unit's; outside the units, that of what it is made from, or of what it is made for when
    it is moved."""
    order = list(dict.fromkeys(devices[unit.path] for unit in recorded.units))
    places: dict[int, str] = {v.id: devices[v.unit] for v in recorded.values if v.unit and v.unit in devices}
    readers: dict[int, list[Op]] = {}
    for op in recorded.ops:
        for value in op.inputs:
            readers.setdefault(value, []).append(op)

    def of(values: tuple[int | None, ...]) -> str | None:
        return next((places[v] for v in values if v is not None and v in places), None)

    by_id: dict[int, Value] = {v.id: v for v in recorded.values}
    seen_unit = False
    for op in recorded.ops:
        seen_unit = seen_unit or op.unit in devices
        place = devices.get(op.unit or "")
        if place is None and op.name in _MOVES:
            read_in = (r.unit for o in op.outputs if o is not None for r in readers.get(o, ()))
            place = next((devices[unit] for unit in read_in if unit and unit in devices), None)
        place = place or of(op.inputs) or (order[-1] if seen_unit else order[0])
        for output in op.outputs:
            if output is not None and by_id[output].producer == op.id:
                places.setdefault(output, place)
    for other in recorded.values:
        places.setdefault(other.id, order[0])
    return places


def plan(
    recorded: Trace, traces: Mapping[str, Trace], budgets: Mapping[str, str | int], devices: Mapping[str, str]
) -> Plan:
    """One plan that holds the budget of every device. Its bytes are sums over the devices, each at its own peak.

    Raises `BudgetInfeasible` naming the device.
    """
    plans: dict[str, Plan] = {}
    for device, seen in traces.items():
        try:
            plans[device] = make_plan(seen, budgets[device])
        except BudgetInfeasible as error:
            raise BudgetInfeasible(error.budget_bytes, error.least_bytes, (f"on {device}", *error.advice)) from None
    if len(plans) == 1:
        (only,) = plans.values()
        return only
    parts = list(plans.values())
    by_unit = {device: {choice.unit: choice for choice in made.choices} for device, made in plans.items()}
    programs = {key: program for made in parts for key, program in made.programs.items()}
    joined = dataclasses.replace(
        parts[0],
        budget_bytes=sum(made.budget_bytes for made in parts),
        choices=tuple(by_unit[devices[u.path]][u.path] for u in recorded.units if u.path in by_unit[devices[u.path]]),
        status=Status.OPTIMAL if all(made.status is Status.OPTIMAL for made in parts) else Status.FEASIBLE,
        recompute_seconds=sum(made.recompute_seconds for made in parts),
        step_seconds=parts[0].step_seconds + sum(made.recompute_seconds for made in parts[1:]),
        bound_seconds=sum(made.bound_seconds for made in parts),
        unplanned_peak_bytes=sum(made.unplanned_peak_bytes for made in parts),
        trace_digest=recorded.digest,
        programs=programs,
        in_place_loss=any(made.in_place_loss for made in parts),
    )
    lines = {
        device: simulate(seen, dataclasses.replace(joined, trace_digest=seen.digest)) for device, seen in traces.items()
    }
    for device, line in lines.items():
        if line.peak_bytes > plans[device].budget_bytes:
            raise BudgetInfeasible(plans[device].budget_bytes, line.peak_bytes, (f"on {device}, with the other plans",))
    return dataclasses.replace(
        joined,
        peak_bytes=sum(line.peak_bytes for line in lines.values()),
        recompute_flops=next(iter(lines.values())).recompute_flops,
        replays=next(iter(lines.values())).replays,
    )
