"""Record one training step below autograd: every op, every storage's life, every tensor that autograd saves.

Idea: three things are watched. A dispatch mode sees each op after autograd has decomposed it. Weak references tell when
a storage dies. Saved-tensor hooks tell what autograd holds, when backward reads it and when autograd lets go of it.
Three passes run over the same step, from the same random state, buffers and gradients:

1. *dry*: forward only, and every saved tensor is thrown away at once. A storage that dies here dies when Python lets go
   of it. This is how long a value lives in forward when it is not kept for backward.
2. *full*: forward and backward, recorded in order.
3. *measured*: the same once more under the allocator's own recording, for the bytes that kernels use inside.

Each pass on the CPU times every op, and on a card the third. Where the timings scatter, more passes follow (`timing`).

The optimizer's step is recorded on fake copies of the parameters, so nothing is updated and nothing is copied.

Invariant: the model, its gradients, its buffers and every random state are left as they were found.
Refused: steps whose passes differ (`Unsupported`). Such a step is not deterministic, so no plan can be trusted.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from tightfit import accelerator, levers
from tightfit.core import (
    Device,
    InvalidInput,
    Trace,
    Unsupported,
)
from tightfit.device.cost import NOMINAL_CUDA
from tightfit.levers.loss_in_place.by_rows import whole
from tightfit.levers.loss_in_place.loss import out_of_place
from tightfit.levers.step_in_backward.hooks import nothing_stepped
from tightfit.plan.indexed import without_collecting
from tightfit.step.environment import calibrated_here
from tightfit.step.modules import UnitsAsked, find_units
from tightfit.step.optimizers import bare
from tightfit.step.parallel import (
    Strategy,
    inside,
    strategy_of,
    unsynchronised,
)
from tightfit.step.patches import (
    compiled_entries,
    compiled_functions,
    no_key_value_cache,
    own_checkpointing_off,
    uncompiled,
)
from tightfit.step.run import (
    LossFunction,
    batch_tensors,
    check_trainable,
    is_elsewhere,
)
from tightfit.step.snapshot import undisturbed
from tightfit.trace.fake import FakeStep, faked, refusals_named
from tightfit.trace.optimizer import record_optimizer
from tightfit.trace.passes import StepRecording, first_pass, record_pass
from tightfit.trace.units import Census

#: Wrappers whose steps a dispatch mode cannot see, or whose peaks are not those of one device.
_NOT_OURS = {
    "DataParallel": "it copies the model to several devices; fit the module inside it, on one",
}


def trace(
    model: nn.Module,
    batch: Any,
    loss: LossFunction | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    units: UnitsAsked = None,
    fake: bool = False,
    device: Device | torch.device | str | None = None,
    tiles: bool = True,
    tiles_alone: bool = False,
) -> Trace:
    """Record one step of `model` on `batch`.

    `loss(model, batch)` gives the scalar loss. By default it is the output's `.loss`, or the output itself. With an
    `optimizer` its state and its step are part of the trace. Gradients that exist when `trace` is called are taken to
    exist at the start of every step (accumulation). `units` names the units, as in `step.modules.find_units`. By
    default other modules are taken where they hold more of what autograd saves (`trace.units`).

    `fake=True` runs the step on fake tensors (`trace.fake`). The model may then live on `meta`, nothing is allocated,
    and seconds are estimated. `device` is then the target: a `Device` of the catalog, or `"cuda"` for CUDA's kernels in
    general. Otherwise `device` only moves `batch`.

    `tiles`: where the loss, or the largest unit, is a large part of what cannot be recomputed, the step is recorded
    again with tiles in force, for plans that need them. A recording takes as long as a step, so this takes up to three
    times as long. With `tiles_alone` it is recorded once, with all in tiles that can be (`Trace.tiling` says what), or
    as it is where nothing can.

    The model's own checkpointing (`gradient_checkpointing_enable`) is off meanwhile, as it is under a plan.

    Raises `InvalidInput` (batch, loss, units), `Unsupported` (a step that cannot be recorded).
    """
    check_trainable(model)
    target = _target(device) if fake else None
    if device is not None and not fake:
        if isinstance(device, Device):
            raise InvalidInput(
                f"a real step runs where the model is; {device.name} can only be the target of fake=True"
            )
        batch = torch.utils._pytree.tree_map(lambda t: t.to(device) if isinstance(t, torch.Tensor) else t, batch)
    modules = find_units(inside(model), units)
    strategy_of(model)  # refuses what is not planned
    applied = any(getattr(module.forward, "__tightfit__", False) for module in model.modules())
    if applied or any(is_elsewhere(parameter) for parameter in model.parameters()):
        raise InvalidInput("a plan is in force on this model, so its own step cannot be seen; remove the plan first")
    for path, module in model.named_modules():
        if type(module).__name__ in _NOT_OURS:
            raise Unsupported(f"{path or 'the model'} is a {type(module).__name__}: {_NOT_OURS[type(module).__name__]}")
    if functions := compiled_functions(model):
        raise Unsupported(
            f"the model calls a function that is compiled ({functions[0]}), and what a compiled function does cannot "
            "be planned op by op: compile the whole block instead (block.compile()), or leave the function uncompiled"
        )
    if any(tensor.is_nested for tensor in batch_tensors(batch)):
        raise Unsupported(
            "the batch has a NestedTensor, and steps on nested (jagged) tensors are not recorded: pad it "
            "(torch.nested.to_padded_tensor), or pack its rows into one"
        )
    if not torch.is_grad_enabled():
        raise InvalidInput("gradients are switched off here (torch.no_grad): there is no training step to trace")
    optimizer = None if optimizer is None else bare(optimizer)
    if fake:
        step = FakeStep(target)
        with (
            without_collecting(),  # fake tensors are many small objects, and what they are of takes no bytes
            _by_no_other_plan(),
            own_checkpointing_off(model),
            refusals_named(f"the {type(model).__name__}"),
            unsynchronised(model),
            uncompiled(model),
            faked(model, batch, step) as fake_batch,
            no_key_value_cache(model),
        ):
            found = _trace(
                model, fake_batch, loss, optimizer, modules, step.restart, step, tiles, units is None, tiles_alone
            )
        return found if target is None or target is device else _said_of(target, found)
    with (
        _by_no_other_plan(),
        own_checkpointing_off(model),
        unsynchronised(model),
        uncompiled(model),
        undisturbed(model, batch) as restart,
        no_key_value_cache(model),
    ):
        return _trace(model, batch, loss, optimizer, modules, restart, None, tiles, units is None, tiles_alone)


@contextlib.contextmanager
def _by_no_other_plan() -> Iterator[None]:
    """What plans that are in force change for the whole process is as it is without them."""
    with out_of_place(), whole(), nothing_stepped():
        yield


def _target(device: Device | torch.device | str | None) -> Device | None:
    if device is None or isinstance(device, Device):
        return device
    device = torch.device(device)
    if accelerator.is_host(device):
        return None
    if not accelerator.is_card(device):
        raise InvalidInput(f"no kernels of {str(device)!r} are known: use cpu, cuda or a GPU of the catalog")
    nominal = NOMINAL_CUDA
    if device.type != nominal.kind:
        nominal = dataclasses.replace(NOMINAL_CUDA, name=device.type, kind=device.type, compute_capability=None)
    return calibrated_here(device, nominal)


def _said_of(target: Device, found: Trace) -> Trace:
    """A forecast for a kind of card whose kernels are not known says whose are taken."""
    if target.kind == NOMINAL_CUDA.kind:
        return found
    line = f"kernels are taken to be CUDA's, which {target.kind}'s resemble but are not"
    return dataclasses.replace(found, notes=(*found.notes, line))


def _trace(
    model: nn.Module,
    batch: Any,
    loss: LossFunction | None,
    optimizer: torch.optim.Optimizer | None,
    modules: Mapping[str, nn.Module],
    restart: Callable[[], None],
    fake: FakeStep | None,
    tiles: bool,
    by_bytes: bool,
    tiles_alone: bool,
) -> Trace:
    """Record the step with `modules` as units. `by_bytes`: the first pass may show better units than `modules`."""
    if strategy_of(model) is Strategy.FSDP2:
        # FSDP2's first forward makes storages that later ones fill again; tiles would compute where weights are missing
        restart()
        record_pass(model, batch, loss, modules, restart, dry=True, fake=fake)
        tiles = by_bytes = False
    # no census on compiled models: the compiler's wrapper would warn of hooks on every module
    census = Census(inside(model)) if by_bytes and not compiled_entries(model) else None
    with census or contextlib.nullcontext():
        dry, seen = first_pass(model, batch, loss, modules, restart, fake, census)
    if census is not None:
        better = census.divided(modules, {storage.id: storage.size_bytes for storage in dry.storages})
        if better.keys() != modules.keys():
            modules = better
            dry, seen = first_pass(model, batch, loss, modules, restart, fake)
    if not dry.frames:
        modules, seen = {"": model}, {}
        restart()
        dry = record_pass(model, batch, loss, modules, restart, dry=True, fake=fake)
    target = fake.target if fake is not None else None
    refused = "" if strategy_of(model) is Strategy.ONE else "several processes share the step"
    tail = None if optimizer is None else record_optimizer(optimizer, target, refused=refused)
    step = StepRecording(model, batch, loss, modules, restart, fake, tail)
    for each in levers.every() if tiles and tiles_alone else ():
        if (alone := each.recorded_alone(step, seen.get(each.lever))) is not None:
            return alone
    recorded = step.first(dry)
    for each in levers.every():
        if tiles or each.is_exact:
            recorded = each.recorded(step, recorded, seen.get(each.lever))
    return recorded
