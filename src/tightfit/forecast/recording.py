"""The step of a setup on fake tensors: its optimizer, its trainer's loss, its shards.

A few blocks are recorded, and the rest is made by repetition.

Invariant: no weights are ever allocated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tightfit.core import (
    HOST_KIND,
    Category,
    Device,
    InvalidInput,
    TightfitError,
    Trace,
    reason_of,
)
from tightfit.device.cost import retimed
from tightfit.forecast.setup import DTYPES, Setup, build_model
from tightfit.integrations.fsdp import shard_bytes
from tightfit.plan.indexed import rest, without_collecting
from tightfit.step.modules import UnitsAsked, find_units
from tightfit.step.parallel import Strategy
from tightfit.step.run import LossFunction, compute_loss, static_bytes_by_category
from tightfit.step.signature import signature_of
from tightfit.trace.fake import FakeStep
from tightfit.trace.optimizer import OptimizerRecord, behind, record_optimizer
from tightfit.trace.recording import trace
from tightfit.trace.unroll import LEAST_BLOCKS, unroll

#: Reached rates against the makers' figures, where nobody measured: 55 % of FLOP/s, 80 % of bandwidth.
FLOPS_EFFICIENCY, BANDWIDTH_EFFICIENCY = 0.55, 0.80


class HashableDevice:
    """A device as a key: its rates are a mapping, and its kernels are all that matters here."""

    def __init__(self, device: Device | None) -> None:
        self.device = device
        self.key = None if device is None else (device.kind, device.compute_capability)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HashableDevice) and other.key == self.key


def _optimizer(model: nn.Module, name: str) -> torch.optim.Optimizer:
    trainable = [p for p in model.parameters() if p.requires_grad]
    if name == "adamw":
        return torch.optim.AdamW(trainable)
    if name == "adamw-fused":
        optimizer = torch.optim.AdamW(trainable)
        for group in optimizer.param_groups:
            group["fused"], group["foreach"] = True, False
        return optimizer
    if name == "sgd":
        return torch.optim.SGD(trainable)
    return _AdamW8bit(trainable, paged=name.startswith("paged"))


class _AdamW8bit(torch.optim.Optimizer):
    """The state of bitsandbytes' 8-bit AdamW, for fake tensors; its kernel updates in place, without temporaries.

    Source: bitsandbytes/optim/optimizer.py, `Optimizer2State.init_state`: blocks of 256 with a float32 scale, float32
    state below 4,096 elements; `get_state_buffer`: paged from 100,000 elements on.
    """

    def __init__(self, params: Any, paged: bool = False) -> None:
        super().__init__(params, {"paged": paged})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's returns the closure's loss
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if state:
                    continue
                small = parameter.numel() < 4096
                if group["paged"] and parameter.numel() >= 100_000:
                    state["step"] = 0
                    continue
                for moment in ("state1", "state2"):
                    dtype = torch.float32 if small else torch.uint8
                    state[moment] = torch.zeros_like(parameter, dtype=dtype)
                    if not small:
                        state[f"absmax_{moment}"] = torch.zeros(-(-parameter.numel() // 256), dtype=torch.float32)


@without_collecting()
def trace_setup(
    setup: Setup,
    device: Device | None = None,
    units: UnitsAsked = None,
    *,
    tiles: bool = False,
    tiles_alone: bool = False,
) -> Trace:
    """The step of `setup` on fake tensors, with the kernels of `device` (`None`: this machine's CPU).

    `tiles`, `tiles_alone`: as in `trace`.

    Raises `InvalidInput` for more tokens than the model has positions, `Unsupported` for a step that fake tensors
    cannot run.
    """
    setup.checked()
    model = build_model(setup)
    from tightfit.integrations.transformers import require_positions

    require_positions(model.config, setup.seq)
    compute = DTYPES[setup.dtype][1]
    spread = _Spread(setup, compute)
    cuda = device is not None and not device.is_host
    with _gradients(model, setup.accumulate), _refusals_of(setup.model), _trainers_step(model, setup, cuda) as step:
        own_loss, batch = step

        def loss(model: nn.Module, batch: Any) -> torch.Tensor:
            with torch.autocast(HOST_KIND, dtype=compute, enabled=compute is not None):
                return compute_loss(model, batch, own_loss)

        autocast = compute is not None and not spread.shards  # FSDP2 casts what it gathers instead
        step_loss = loss if autocast else own_loss
        twice = setup.trainer == "dpo" and not dict(setup.settings).get("precompute_ref_log_probs")
        recorded = _traced(model, batch, step_loss, device, units, (tiles, tiles_alone), spread, shortened=not twice)
    recorded = spread.with_buckets(model, recorded, FakeStep(device).granule_bytes)
    if spread.strategy is not Strategy.ONE:  # whose weights are not streamed yet
        tiled = tuple(dataclasses.replace(variant, frozen=()) for variant in recorded.tiled)
        recorded = dataclasses.replace(recorded, frozen=(), tiled=tiled)
    if setup.optimizer == "none":
        return recorded
    record = optimizer_record(*optimizer_key(setup), HashableDevice(device))
    if record.refused and "8bit" in setup.optimizer:  # not by the name of what stands for it here
        record = dataclasses.replace(record, refused=f"{setup.optimizer} steps by kernels that no trial here can run")
    if spread.strategy is not Strategy.ONE:
        record = dataclasses.replace(record, in_chunks=(), alone=(), refused="several processes share the step")
    return behind(recorded, record)


@contextlib.contextmanager
def _trainers_step(model: nn.Module, setup: Setup, cuda: bool) -> Iterator[tuple[LossFunction | None, dict[str, Any]]]:
    """The loss of `setup`'s trainer (`None`: the model's own) and its batch."""
    if setup.trainer != "model":
        from tightfit.integrations.trainer_step import trainers_step

        asked = dict(setup.settings)
        with trainers_step(model, setup.trainer, asked, batch=setup.batch, seq=setup.seq, cuda=cuda) as step:
            yield step
        return
    ids = torch.zeros(setup.batch, setup.seq, dtype=torch.long)
    yield None, {"input_ids": ids, "labels": ids}


class _Spread:
    """How a setup's step is spread over processes; this is rank 0's."""

    def __init__(self, setup: Setup, compute: torch.dtype | None) -> None:
        self.strategy, self.world_size, self.compute = Strategy(setup.strategy), setup.world_size, compute
        self.reshards = setup.reshard

    @property
    def shards(self) -> bool:
        return self.strategy is Strategy.FSDP2

    def of(self, model: nn.Module) -> contextlib.AbstractContextManager[nn.Module]:
        """The model that this rank has."""
        if not self.shards:
            return contextlib.nullcontext(model)
        from tightfit.integrations.fsdp import sharded

        return sharded(model, self.world_size, self.compute, reshards=self.reshards)

    def static_bytes(self, model: nn.Module, batch: Any, granule_bytes: int) -> dict[str, int]:
        found = static_bytes_by_category(model, batch, granule_bytes=granule_bytes)
        if self.shards:
            found[Category.PARAMETERS.value] = sum(
                shard_bytes(each, self.world_size, granule_bytes) for each in model.parameters()
            )
            found[Category.GRADIENTS.value] = sum(
                shard_bytes(each.grad, self.world_size, granule_bytes)
                for each in model.parameters()
                if each.grad is not None
            )
        return found

    def with_buckets(self, model: nn.Module, recorded: Trace, granule_bytes: int) -> Trace:
        """`recorded` with DDP's buckets, which are as large as the gradients."""
        if self.strategy is not Strategy.DDP:
            return recorded
        size_bytes = sum(
            -(-p.numel() * p.element_size() // granule_bytes) * granule_bytes
            for p in model.parameters()
            if p.requires_grad
        )
        static = {**recorded.static_bytes, Category.COLLECTIVES.value: size_bytes}
        tiled = tuple(self.with_buckets(model, variant, granule_bytes) for variant in recorded.tiled)
        return dataclasses.replace(recorded, static_bytes=static, tiled=tiled)


def optimizer_key(setup: Setup) -> tuple[Setup, str, int]:
    shards = setup.world_size if setup.strategy == Strategy.FSDP2.value else 1
    return dataclasses.replace(setup.of_model, trainer=setup.trainer), setup.optimizer, shards


@contextlib.contextmanager
def as_trained(setup: Setup) -> Iterator[Any]:
    """The model of `setup` as its trainer trains it, given back as it was: TRL changes the dtype of what is trained."""
    model = build_model(setup)
    with _trainers_step(model, dataclasses.replace(setup, batch=1, seq=8), cuda=False):
        yield model


@functools.lru_cache(maxsize=4)
def optimizer_record(model: Setup, optimizer: str, shards: int, device: HashableDevice) -> OptimizerRecord:
    """The optimizer's step depends on the parameters alone, so one serves every batch and length."""
    with as_trained(model) as whole:
        trained: nn.Module = whole
        if shards > 1:
            trained = nn.ParameterList(
                nn.Parameter(p.new_empty(-(-p.shape[0] // shards), *p.shape[1:]) if p.dim() else p.new_empty(()))
                for p in trained.parameters()
                if p.requires_grad
            )
        return record_optimizer(_optimizer(trained, optimizer), device.device)


@contextlib.contextmanager
def _refusals_of(name: str) -> Iterator[None]:
    """What a model raises because its config does not fit together is wrong input, not an answer."""
    try:
        yield
    except (RuntimeError, AssertionError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        if isinstance(error, TightfitError):
            raise
        raise InvalidInput(
            f"the step of {name!r} cannot be run ({type(error).__name__}: {reason_of(error)})"
        ) from error


@contextlib.contextmanager
def _gradients(model: nn.Module, there: bool) -> Iterator[None]:
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable if there else ():
        parameter.grad = torch.empty_like(parameter)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.grad = None


def _traced(
    model: nn.Module,
    batch: Any,
    loss: Any,
    device: Device | None,
    units: UnitsAsked,
    tiles: tuple[bool, bool],
    spread: _Spread,
    *,
    shortened: bool,
) -> Trace:
    """The whole model's trace, by way of a few of its blocks where these are alike. `tiles`: whether, and whether
    alone.

    `shortened`: each block runs once, so that a few may stand for all. DPO's reference runs them a second time.
    """
    stack = _stack(model) if units is None and shortened else None
    in_tiles, alone = tiles
    record = functools.partial(trace, fake=True, device=device, tiles=in_tiles, tiles_alone=alone)
    blocks = LEAST_BLOCKS + 2 * spread.shards  # sharded, a block reaches into the time of its neighbours
    if stack is not None and len(find_units(model)) < (blocks + 2) * stack.period:
        stack = None
    if stack is not None:
        paths = list(find_units(model))
        with contextlib.suppress(IndexError, KeyError):  # a model that counts on all its layers
            with _excerpt(stack, blocks), spread.of(model) as excerpt:
                few = record(excerpt, batch, loss)
            whole = unroll(few, paths, stack.period)
            if whole is not None:
                static = dict(few.static_bytes)
                granule = FakeStep(device).granule_bytes
                static.update(spread.static_bytes(model, batch, granule))
                tiled = tuple(dataclasses.replace(variant, static_bytes=static) for variant in whole.tiled)
                return dataclasses.replace(whole, static_bytes=static, tiled=tiled)
    with spread.of(model) as whole_model:
        return record(whole_model, batch, loss, units=units)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stack:
    """The list that holds all of a model's units, and how many of them make a block that repeats."""

    owner: nn.Module
    name: str
    period: int


def _stack(model: nn.Module) -> _Stack | None:
    """The model's stack when it is worth shortening: one list, blocks that repeat, at least two more than needed."""
    units = find_units(model)
    for owner in model.modules():
        for name, child in owner.named_children():
            layers = list(child.children()) if isinstance(child, nn.ModuleList) else []
            if layers and layers == list(units.values()):
                described = [_description(layer) for layer in layers]
                for period in range(1, len(layers) // (LEAST_BLOCKS + 2) + 1):
                    rest = range(2 * period, len(layers) - period)
                    if len(layers) % period == 0 and all(described[i] == described[i + period] for i in rest):
                        return _Stack(owner=owner, name=name, period=period)
    return None


#: How layers number themselves.
_NUMBERS = frozenset({"layer_idx", "layer_id", "layer_index", "layer_number", "idx"})


def _description(layer: nn.Module) -> str:
    """What tells a layer from another: classes, parameters and settings (a window, a rotary base), not its number."""
    settings = [
        (path, type(module).__qualname__, name, repr(value))
        for path, module in layer.named_modules()
        for name, value in sorted(vars(module).items())
        if isinstance(value, (int, float, str, bool, type(None))) and name not in _NUMBERS
    ]
    return signature_of(layer) + repr(settings)


@contextlib.contextmanager
def _excerpt(stack: _Stack, blocks: int) -> Iterator[None]:
    """The model with only its first blocks and its last, `blocks` in all."""
    whole: Any = getattr(stack.owner, stack.name)
    layers = list(whole)
    first = (blocks - 1) * stack.period
    setattr(stack.owner, stack.name, nn.ModuleList([*layers[:first], *layers[-stack.period :]]))
    try:
        yield
    finally:
        setattr(stack.owner, stack.name, whole)


def reached(device: Device) -> Device:
    """`device` with the rates that programs reach; those of a calibrated file are measured and stay."""
    if device.source.startswith("measured"):
        return device
    return dataclasses.replace(
        device,
        flops_per_second={dtype: rate * FLOPS_EFFICIENCY for dtype, rate in device.flops_per_second.items()},
        memory_bytes_per_second=device.memory_bytes_per_second * BANDWIDTH_EFFICIENCY,
    )


@without_collecting()
def trace_for(setup: Setup, device: Device, *, tiles: bool = False, tiles_alone: bool = False) -> Trace:
    """The trace that `check` plans: that of `trace_setup` with the seconds that `device` reaches."""
    recorded = trace_setup(setup, device, tiles=tiles, tiles_alone=tiles_alone)
    rest()
    return retimed(recorded, reached(device))


def sent_bytes(recorded: Trace, setup: Setup) -> tuple[int, int]:
    """Bytes that a rank receives for gathering weights, and that it sends for reducing gradients, in one step.

    By ring collectives, which move (n - 1) / n of a buffer in each of their halves; DDP's all-reduce has both.
    """
    share = (setup.world_size - 1) / setup.world_size
    size = {value.id: value.size_bytes for value in recorded.values}
    gathered = sum(size[op.inputs[0]] for op in recorded.ops if op.name == "c10d._allgather_base_.default")
    reduced = sum(size[op.inputs[1]] for op in recorded.ops if op.name == "c10d._reduce_scatter_base_.default")
    buckets = recorded.static_bytes.get(Category.COLLECTIVES.value, 0)
    return int(share * gathered), int(share * (reduced + 2 * buckets))
