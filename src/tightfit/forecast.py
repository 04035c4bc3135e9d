"""Will it run? The step itself on fake tensors, with the plan applied, for a device that is not there.

The model is built on `meta` from its published shape or its `config.json`, with the method's adapters, 4-bit twins and
optimizer. Its step is traced for the device's kernels (`tightfit.fake`), a few blocks of it and the rest by repetition
(`tightfit.unroll`), planned for the device's memory and laid out by the caching allocator's rules
(`tightfit.allocator`). Seconds are a roofline over the catalog's rates and are only ever called estimated.

Invariant: no weights are ever allocated, nothing is downloaded but a hub id's config. "Fits" means that the reserved
bytes, the driver's context and the margin are within the card together. Refused: models whose step needs values that
fake tensors do not have (`Unsupported`), sizes that the model has no positions for (`InvalidInput`).
"""

from __future__ import annotations

import bisect
import contextlib
import copy
import dataclasses
import functools
import json
import stat
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tightfit.allocator import OutOfMemory, reserved_peak_bytes
from tightfit.catalog import gpu, gpu_names
from tightfit.core import (
    BudgetInfeasible,
    Category,
    Device,
    Forecast,
    InvalidInput,
    Lever,
    Mode,
    Plan,
    TightfitError,
    Timeline,
    Trace,
    Unsupported,
    format_bytes,
    parse_bytes,
    reason_of,
    require_part,
)
from tightfit.cost import NOMINAL_CUDA, retimed
from tightfit.fake import FakeStep
from tightfit.integrations.fsdp import shard_bytes
from tightfit.measure import every_block_checkpointed
from tightfit.parallel import Strategy
from tightfit.plan import Effort, every_block, lowest, plan, simulate
from tightfit.plan.simulate import allocations
from tightfit.report.text import tiles_said
from tightfit.step import LossFunction, UnitsAsked, compute_loss, environment, find_units, static_bytes_by_category
from tightfit.trace import OptimizerRecord, behind, record_optimizer, signature_of, trace
from tightfit.unroll import LEAST_BLOCKS, unroll

__all__ = [
    "Setup",
    "calibrated",
    "check",
    "default_length",
    "device_asked",
    "least_peak_bytes",
    "longest_length",
    "trace_for",
    "trace_setup",
    "usable_bytes",
    "which_gpus",
]

STRATEGIES = tuple(each.value for each in Strategy)
TRAINERS = ("model", "sft")
METHODS = ("full", "lora", "qlora")
OPTIMIZERS = ("adamw", "adamw-fused", "adamw8bit", "paged-adamw8bit", "sgd", "none")
DTYPES = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),  # float32 weights under autocast
    "fp16-mixed": (torch.float32, torch.float16),
}

#: What the driver and the loaded kernels take before the first tensor; 0.3 to 0.6 GiB are reported.
CONTEXT_BYTES = 600 * 2**20
#: What Metal lets one process wire of the unified memory (`recommendedMaxWorkingSetSize`).
UNIFIED_SHARE = 0.75
#: Kept free beside the forecast: the CUDA side of it (kernels' scratch, libraries' workspaces) was not measured here.
MARGIN = 0.02
#: Reached rates against the makers' figures, where nobody measured: 55 % of FLOP/s, 80 % of bandwidth.
FLOPS_EFFICIENCY, BANDWIDTH_EFFICIENCY = 0.55, 0.80
SEQ_STEP = 64
#: No batch of more tokens is looked at.
MOST_TOKENS = 1 << 24

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is asked about: a model and how it is trained."""

    model: str
    method: str = "full"
    batch: int = 1
    seq: int = 2048
    dtype: str = "bf16"
    optimizer: str = "adamw"
    rank: int = 16
    accumulate: bool = False  # gradients of earlier micro-batches are there when a step begins
    world_size: int = 1  # processes, each with a device and a batch of its own
    strategy: str = "one"  # how the step is spread over them
    reshard: bool = True  # FSDP2: are a unit's weights given back between its forward and its backward?
    trainer: str = "model"  # whose loss: the model's own, as transformers' Trainer takes it, or TRL's for SFT
    settings: tuple[tuple[str, Any], ...] = ()  # of that trainer, as its config names them

    def checked(self) -> Setup:
        """Itself. Raises `InvalidInput` for what cannot be meant."""
        for what, value, known in (
            ("method", self.method, METHODS), ("optimizer", self.optimizer, OPTIMIZERS), ("dtype", self.dtype, DTYPES),
            ("strategy", self.strategy, STRATEGIES), ("trainer", self.trainer, TRAINERS),
        ):  # fmt: skip
            if value not in known:
                raise InvalidInput(f"unknown {what} {value!r}: use {', '.join(known)}")
        if not 1 <= self.world_size <= 1 << 16:
            raise InvalidInput(f"expected a world size from 1 to {1 << 16}, not {self.world_size}")
        if self.world_size > 1 and self.strategy == "one":
            raise InvalidInput(f"{self.world_size} processes were asked for: say how they share the step, ddp or fsdp2")
        if not self.reshard and self.strategy != "fsdp2":
            raise InvalidInput("only FSDP2 gives weights back: --no-reshard goes with --strategy fsdp2")
        if self.method == "qlora" and self.strategy == "fsdp2":
            raise Unsupported("4-bit weights cannot be sharded by FSDP2: use strategy ddp, or method lora")
        if self.batch < 1:
            raise InvalidInput(f"expected a batch of at least 1 sequence, not {self.batch}")
        if self.seq < 2:
            raise InvalidInput(f"expected a sequence of at least 2 tokens, not {self.seq}")
        if not 1 <= self.rank <= 1 << 16:
            raise InvalidInput(f"expected a LoRA rank from 1 to {1 << 16}, not {self.rank}")
        if self.batch * self.seq > MOST_TOKENS:
            raise InvalidInput(
                f"a batch of {self.batch} x {self.seq} tokens was asked for; more than {MOST_TOKENS} are not looked at"
            )
        return self


# ------------------------------------------------------------------------------------------ the model


@functools.lru_cache(maxsize=4)
def _model(name: str, method: str, dtype: str, rank: int) -> Any:
    """The model on `meta`, in training mode, with the method's parameters trainable."""
    from transformers import AutoModelForCausalLM

    from tightfit.integrations.transformers import config_named

    config = copy.deepcopy(config_named(name))
    weights, compute = DTYPES[dtype]
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=weights, trust_remote_code=False)
    except Exception as error:  # model classes raise what they like for configs that do not fit together
        first_line = " ".join(line.strip() for line in str(error).splitlines() if line.strip())[:200]
        raise InvalidInput(
            f"no causal language model can be built from the config of {name!r} ({type(error).__name__}: {first_line})"
        ) from error
    model.train()
    if method == "qlora":
        from tightfit.integrations.bitsandbytes import quantise

        model = quantise(model, compute or weights)
    if method != "full":
        from tightfit.integrations.peft import add_lora

        with torch.device("meta"):
            model = add_lora(model, rank=rank)
    return model


def default_length(name: str) -> int:
    """2,048 tokens, or as many as the model has positions for."""
    from tightfit.integrations.transformers import config_named, positions_of

    positions = positions_of(config_named(name))
    return 2048 if positions is None else min(2048, positions)


def _positions(model: Any) -> int | None:
    from tightfit.integrations.transformers import positions_of

    return positions_of(model.config)


class _HashableDevice:
    """A device as a key: its rates are a mapping, and its kernels are all that matters here."""

    def __init__(self, device: Device | None) -> None:
        self.device = device
        self.key = None if device is None else (device.kind, device.compute_capability)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _HashableDevice) and other.key == self.key


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


# ------------------------------------------------------------------------------------------ the trace


def trace_setup(setup: Setup, device: Device | None = None, units: UnitsAsked = None, *, tiles: bool = False) -> Trace:
    """The step of `setup` on fake tensors, with the kernels of `device` (`None`: this machine's CPU).

    `tiles`: recorded with tiles in force too, which takes several times as long.

    Raises `InvalidInput` for more tokens than the model has positions, `Unsupported` for a step that fake tensors
    cannot run.
    """
    setup.checked()
    model = _model(setup.model, setup.method, setup.dtype, setup.rank)
    from tightfit.integrations.transformers import require_positions

    require_positions(model.config, setup.seq)
    compute = DTYPES[setup.dtype][1]
    spread = _Spread(setup, compute)
    cuda = device is not None and device.kind != "cpu"
    with _gradients(model, setup.accumulate), _refusals_of(setup.model), _trainers_step(model, setup, cuda) as step:
        own_loss, batch = step

        def loss(model: nn.Module, batch: Any) -> torch.Tensor:
            with torch.autocast("cpu", dtype=compute, enabled=compute is not None):
                return compute_loss(model, batch, own_loss)

        autocast = compute is not None and not spread.shards  # FSDP2 casts what it gathers instead
        recorded = _traced(model, batch, loss if autocast else own_loss, device, units, tiles, spread)
    recorded = spread.with_buckets(model, recorded, FakeStep(device).granule_bytes)
    if setup.optimizer == "none":
        return recorded
    return behind(recorded, _optimizer_record(*_optimizer_key(setup), _HashableDevice(device)))


@contextlib.contextmanager
def _trainers_step(model: nn.Module, setup: Setup, cuda: bool) -> Iterator[tuple[LossFunction | None, dict[str, Any]]]:
    """The loss of `setup`'s trainer (`None`: the model's own) and its batch."""
    if setup.trainer == "sft":
        from tightfit.integrations.trainer_step import sft_step

        with sft_step(model, dict(setup.settings), batch=setup.batch, seq=setup.seq, cuda=cuda) as step:
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


def _optimizer_key(setup: Setup) -> tuple[str, str, str, int, str, int]:
    shards = setup.world_size if setup.strategy == Strategy.FSDP2.value else 1
    return setup.model, setup.method, setup.dtype, setup.rank, setup.optimizer, shards


@functools.lru_cache(maxsize=4)
def _optimizer_record(
    model: str, method: str, dtype: str, rank: int, optimizer: str, shards: int, device: _HashableDevice
) -> OptimizerRecord:
    """The optimizer's step depends on the parameters alone, so one serves every batch and length."""
    trained: nn.Module = _model(model, method, dtype, rank)
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
    model: nn.Module, batch: Any, loss: Any, device: Device | None, units: UnitsAsked, tiles: bool, spread: _Spread
) -> Trace:
    """The whole model's trace, by way of a few of its blocks where these are alike."""
    stack = _stack(model) if units is None else None
    blocks = LEAST_BLOCKS + 2 * spread.shards  # sharded, a block reaches into the time of its neighbours
    if stack is not None and len(find_units(model)) < (blocks + 2) * stack.period:
        stack = None
    if stack is not None:
        paths = list(find_units(model))
        with contextlib.suppress(IndexError, KeyError):  # a model that counts on all its layers
            with _excerpt(stack, blocks), spread.of(model) as excerpt:
                few = trace(excerpt, batch, loss, fake=True, device=device, tiles=tiles)
            whole = unroll(few, paths, stack.period)
            if whole is not None:
                static = dict(few.static_bytes)
                granule = FakeStep(device).granule_bytes
                static.update(spread.static_bytes(model, batch, granule))
                tiled = tuple(dataclasses.replace(variant, static_bytes=static) for variant in whole.tiled)
                return dataclasses.replace(whole, static_bytes=static, tiled=tiled)
    with spread.of(model) as whole_model:
        return trace(whole_model, batch, loss, units=units, fake=True, device=device, tiles=tiles)


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


# ----------------------------------------------------------------------------------------- the device


def device_asked(text: str) -> Device:
    """A GPU of the catalog, or a card of the size that `text` gives (`24GiB`), with an A100's rates."""
    try:
        size_bytes = parse_bytes(text)
    except InvalidInput:
        if text.strip()[:1].isdigit():
            raise
        return gpu(text)
    return dataclasses.replace(NOMINAL_CUDA, name=text, memory_bytes=size_bytes)


def usable_bytes(device: Device) -> int:
    """What the allocator may reserve: the memory without the driver's context and the margin."""
    if device.kind == "mps":
        return int(device.memory_bytes * UNIFIED_SHARE / (1 + MARGIN))
    return max(0, int((device.memory_bytes - CONTEXT_BYTES) / (1 + MARGIN)))


def reached(device: Device) -> Device:
    """`device` with the rates that programs reach; those of a calibrated file are measured and stay."""
    if device.source.startswith("measured"):
        return device
    return dataclasses.replace(
        device,
        flops_per_second={dtype: rate * FLOPS_EFFICIENCY for dtype, rate in device.flops_per_second.items()},
        memory_bytes_per_second=device.memory_bytes_per_second * BANDWIDTH_EFFICIENCY,
    )


# ----------------------------------------------------------------------------------------- the answer


def _room(device: Device, budget: str | int | None) -> int:
    """What the allocator may reserve of `device`."""
    room = usable_bytes(device)
    if budget is not None:
        require_part(budget, f"the device's {format_bytes(device.memory_bytes)}")
    return room if budget is None else min(room, parse_bytes(budget, whole_bytes=device.memory_bytes))


def _leave_room(device: Device, room: int) -> None:
    if room <= 0:
        raise InvalidInput(
            f"a device of {format_bytes(device.memory_bytes)} leaves nothing for tensors beside the driver's "
            f"{format_bytes(CONTEXT_BYTES)}"
        )


def check(
    setup: Setup,
    device: Device,
    *,
    budget: str | int | None = None,
    search: bool = True,
    progress: Progress = lambda _: None,
    traced: Callable[[Trace], None] = lambda _: None,
) -> Forecast:
    """Whether the step of `setup` runs on `device`, and how.

    `budget`: what the allocator may take of the device, bytes or a percentage of its memory; all that is usable by
    default. `search` also looks for the largest batch and the longest sequence. `traced` is given the trace that the
    plan is of, for a report. Raises as `trace_setup` does, and `InvalidInput` for a budget that is no size.
    """
    setup.checked()
    room = _room(device, budget)
    _leave_room(device, room)
    progress("tracing the step on fake tensors")
    recorded = trace_for(setup, device)
    progress("planning")
    modes = [
        _mode("none", recorded, simulate(recorded), None, room),
        _blocks_mode(setup, device, recorded, room),
    ]
    # near the limit the layout decides, and a coarser search may find what a finer one does not
    hopeless = _floor(setup, device) > room  # what does not depend on the batch is too much already
    made = None if hopeless else _fitted(recorded, room, _SHOWN) or _fitted(recorded, room, _QUICK)
    if made is None and not hopeless:
        progress("nothing exact fits: tracing the step in tiles")
        recorded = trace_for(setup, device, tiles=True)
        made = _fitted(recorded, room, _QUICK) if recorded.tiled else None
    traced(recorded)
    shown = made or lowest(recorded, effort=_QUICK)
    modes.append(_mode("tightfit", recorded, simulate(recorded, shown), shown, room))
    base_seconds = modes[0].step_seconds
    modes = [dataclasses.replace(mode, slowdown=mode.step_seconds / base_seconds) for mode in modes]
    fits = made is not None
    largest = longest = None
    if search and hopeless:
        largest = longest = 0
    elif search:
        levers = _levers_of(made)
        here = (fits, _least(recorded, room, levers)[1])
        largest = _largest(setup, device, room, progress, "batch", here, levers)
        longest = _largest(setup, device, room, progress, "seq", here, levers)
    advice: tuple[str, ...] = ()
    if not fits:
        advice = tuple(_advice(setup, device, room, recorded, largest, longest, progress))
    return Forecast(
        model=setup.model,
        method=setup.method,
        batch=setup.batch,
        seq=setup.seq,
        dtype=setup.dtype,
        optimizer=setup.optimizer,
        gpu=device.name,
        gpu_bytes=device.memory_bytes,
        usable_bytes=room,
        fits=fits,
        modes=tuple(modes),
        plan=made,
        essence=tuple(_essence(recorded, made)) if made is not None else (),
        largest_batch=largest,
        longest_seq=longest,
        advice=advice,
        error_bar=_error_bar(device),
        notes=(*recorded.notes, *_kept_whole(recorded), *_notes(setup, device), *_spread_notes(setup, recorded)),
        environment=environment(),
    )


def _levers_of(made: Plan | None) -> frozenset[Lever] | None:
    """What the searches may use: all that is exact where the plan for the size that was asked for is, else everything.

    Tiles make every trace three times as long, and they are not bit for bit, so nobody gets them who did not need them.
    """
    if made is None or not made.exact:
        return None
    return frozenset({Lever.RECOMPUTE, Lever.LOSS_IN_PLACE, Lever.NEST})


def trace_for(setup: Setup, device: Device, *, tiles: bool = False) -> Trace:
    """The trace that `check` plans: that of `trace_setup` with the seconds that `device` reaches."""
    return retimed(trace_setup(setup, device, tiles=tiles), reached(device))


def _mode(name: str, recorded: Trace, line: Timeline, made: Plan | None, room: int) -> Mode:
    reserved = _reserved(recorded, made)
    assert reserved is not None
    within = _reserved(recorded, made, room)
    fits = line.peak_bytes <= room and within is not None
    if fits and within is not None:
        reserved = min(reserved, within)  # on this card the allocator gives free segments back before it fails
    at_peak = {category: rows[line.peak_event] for category, rows in line.by_category.items()}
    step_seconds = sum(op.seconds for op in recorded.ops) + line.recompute_seconds
    step_seconds += 0.0 if made is None else made.tile_seconds
    phase = line.peak_owner.split()[0]
    return Mode(
        mode=name,
        fits=fits,
        peak_bytes=line.peak_bytes,
        reserved_bytes=reserved,
        by_category={**at_peak, "allocator_slack": reserved - line.peak_bytes},
        peak_owner=line.peak_owner,
        peak_phase="backward" if phase == "replay" else phase,
        step_seconds=step_seconds,
        slowdown=1.0,
        recompute_flops=line.recompute_flops,
    )


def _blocks_mode(setup: Setup, device: Device, recorded: Trace, room: int) -> Mode:
    """Every block recomputed. Where a unit cannot be planned, the step with torch.utils.checkpoint itself is traced."""
    if any(unit.pinned for unit in recorded.units):
        model = _model(setup.model, setup.method, setup.dtype, setup.rank)
        with every_block_checkpointed(model):
            whole = retimed(trace_setup(setup, device, units=[""]), reached(device))
        mode = _mode("every-block", whole, simulate(whole), None, room)
        return dataclasses.replace(mode, recompute_flops=_flops(whole) - _flops(recorded))
    blocks = every_block(recorded, effort=_QUICK)
    return _mode("every-block", recorded, simulate(recorded, blocks), blocks, room)


#: For the plan that is shown, and for the many that only have to be possible.
_SHOWN = Effort(points=48, solver_seconds=0.4, proves=False)
_QUICK = Effort(points=12, solver_seconds=0.3, proves=False)


def _flops(recorded: Trace) -> int:
    return sum(op.flops for op in recorded.ops)


def _reserved(recorded: Trace, made: Plan | None, room: int | None = None) -> int | None:
    """Most bytes reserved in a step, `None` when that fails; under `room` free segments are given back first."""
    static, step = allocations(recorded, made)
    if recorded.random_state_bytes:  # the CPU has no caching allocator
        return simulate(recorded, made).peak_bytes
    try:
        return (
            reserved_peak_bytes(static, step) if room is None else reserved_peak_bytes(static, step, limit_bytes=room)
        )
    except OutOfMemory:
        return None


def _fitted(recorded: Trace, room: int, effort: Effort, levers: frozenset[Lever] | None = None) -> Plan | None:
    """The plan of least recompute with which the allocator stays within `room`; `None` when there is none."""
    budget = room
    for _ in range(4 if effort.points > _QUICK.points else 3):
        try:
            made = plan(recorded, budget, effort=effort, levers=levers)
        except BudgetInfeasible:
            break
        if _reserved(recorded, made, room) is not None:
            return made
        reserved = _reserved(recorded, made) or room
        # fragmentation: leave the allocator as much more as it took beyond what was live
        budget = int(min(budget * 0.97, room * made.peak_bytes / max(reserved, made.peak_bytes)))
    made = lowest(recorded, effort=effort, levers=levers)
    for part in (0.75, 0.5, 0.25) if effort is _SHOWN and 0 < made.peak_bytes < budget else ():
        target = made.peak_bytes + int(part * (budget - made.peak_bytes))
        between = plan(recorded, target, effort=effort, levers=levers)
        if _reserved(recorded, between, room) is not None:
            return between
    fits = made.peak_bytes <= room and _reserved(recorded, made, room) is not None
    return dataclasses.replace(made, budget_bytes=room) if fits else None


def _least(recorded: Trace, room: int, levers: frozenset[Lever] | None = None) -> tuple[bool, int]:
    """Whether some plan runs within `room`, and what the one of the lowest peak makes the allocator reserve."""
    made = lowest(recorded, effort=_QUICK, levers=levers)
    reserved = _reserved(recorded, made)
    assert reserved is not None
    if reserved <= room:
        return True, reserved
    if made.peak_bytes > room:
        return False, reserved
    # within the allocator's slack the lowest peak need not be the plan that is laid out best
    runs = _reserved(recorded, made, room) is not None or _fitted(recorded, room, _QUICK, levers) is not None
    return runs, reserved


def least_peak_bytes(recorded: Trace) -> int:
    """The lowest peak of any plan, in allocated bytes."""
    return lowest(recorded, effort=_QUICK).peak_bytes


# --------------------------------------------------------------------------------------- the searches


def _largest(
    setup: Setup,
    device: Device,
    room: int,
    progress: Progress,
    what: str,
    here: tuple[bool, int],
    levers: frozenset[Lever] | None,
) -> int:
    """The largest batch, or the longest sequence in steps of 64 tokens, whose step some plan fits into `room`.

    Bytes are nearly affine in both, so the line through two answers says where to look next; every answer is a step,
    traced, planned and laid out. `here`: whether the size that was asked for fits, and the least that it reserves.
    0: not even the smallest fits.
    """
    step = 1 if what == "batch" else SEQ_STEP
    positions = _positions(_model(setup.model, setup.method, setup.dtype, setup.rank))
    most = max(1, MOST_TOKENS // setup.seq) if what == "batch" else (positions or MOST_TOKENS // setup.batch) // step
    asked = getattr(setup, what)
    tried: dict[int, tuple[bool, int]] = {}
    if asked % step == 0:
        tried[asked // step] = here
    low, high = 0, most + 1  # low fits (or is nothing), high does not
    guess = min(max(1, asked // step), most)
    while low < high - 1:
        if guess not in tried:
            amount = guess * step
            progress(f"looking for the {'largest batch' if what == 'batch' else 'longest sequence'}: {amount}")
            recorded = trace_for(_resized(setup, what, amount), device)
            tried[guess] = _least(recorded, room, levers)
            if levers is None and not tried[guess][0] and tried[guess][1] <= _TILES_CAN * room:
                recorded = trace_for(_resized(setup, what, amount), device, tiles=True)
                tried[guess] = _least(recorded, room) if recorded.tiled else tried[guess]
        low, high = (guess, high) if tried[guess][0] else (low, guess)
        guess = _guess({count: reserved for count, (_, reserved) in tried.items()}, room, low, high)
    return max(low * step, asked if here[0] else 0)


#: Tiles are not tried where a plan without them takes this many times the room.
_TILES_CAN = 3


def _floor(setup: Setup, device: Device) -> int:
    """Bytes that any step has at once, whatever its batch: weights, optimizer state, and gradients when it steps."""
    model = _model(setup.model, setup.method, setup.dtype, setup.rank)
    static = sum(static_bytes_by_category(model).values())
    if setup.optimizer == "none":
        return static // (setup.world_size if setup.strategy == Strategy.FSDP2.value else 1)
    gradients: int = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    record: OptimizerRecord = _optimizer_record(*_optimizer_key(setup), _HashableDevice(device))
    if setup.strategy == Strategy.FSDP2.value:
        return (static + gradients) // setup.world_size + record.state_bytes
    return static + gradients * (2 if setup.strategy == Strategy.DDP.value else 1) + record.state_bytes


def _resized(setup: Setup, what: str, amount: int) -> Setup:
    return dataclasses.replace(setup, batch=amount) if what == "batch" else dataclasses.replace(setup, seq=amount)


def _guess(reserved: dict[int, int], room: int, low: int, high: int) -> int:
    """Where to look next, strictly between `low` and `high` if anything is."""
    below, above = low in reserved, high in reserved
    if len(reserved) > 6 and below and above:  # the line does not help: halve
        guess = (low + high) // 2
    elif below and above:
        slope = (reserved[high] - reserved[low]) / (high - low)
        guess = int(low + (room - reserved[low]) / slope) if slope > 0 else (low + high) // 2
    elif below:
        # what does not grow with the size (the optimizer's step) may still own the peak at small ones
        before = max((count for count in reserved if count < low), default=None)
        slope = 0.0 if before is None else (reserved[low] - reserved[before]) / (low - before)
        guess = int(low + (room - reserved[low]) / slope) if slope > 0 else low * 4 if low > 1 else 2
        if before is not None:  # under a limit the allocator wastes less than the line says
            guess = max(guess, low + min(low - before, max(1, low // 8)))
        guess = min(guess, low * 16)
    else:
        guess = high // 2
    return min(max(guess, low + 1), max(high - 1, low + 1))


# ----------------------------------------------------------------------------------------- the advice


def _advice(
    setup: Setup,
    device: Device,
    room: int,
    recorded: Trace,
    largest: int | None,
    longest: int | None,
    progress: Progress,
) -> Iterable[str]:
    """What would make it fit, cheapest first, each with its number."""
    static = recorded.static_bytes
    weights = static.get(Category.PARAMETERS.value, 0) + static.get(Category.QUANTISED.value, 0)
    if weights > room:
        yield (
            f"the weights alone take {format_bytes(weights)}, more than the {format_bytes(room)} that {device.name} "
            "leaves for tensors"
        )

    def tell(said: str, **changed: Any) -> Iterator[str]:
        progress(f"trying {said}")
        try:
            if _floor(dataclasses.replace(setup, **changed), device) > room:
                return
            other = trace_setup(dataclasses.replace(setup, **changed), device)
        except (InvalidInput, Unsupported):
            return
        runs, _ = _least(other, room)
        if runs:
            yield f"{said} fits: from {format_bytes(least_peak_bytes(other))} on"

    if setup.optimizer == "adamw":
        yield from tell("the fused optimizer (--optimizer adamw-fused)", optimizer="adamw-fused")
    if largest and largest < setup.batch:
        yield f"a batch of {largest} instead of {setup.batch} fits at {setup.seq} tokens"
    if longest and longest < setup.seq:
        yield f"sequences of {longest} instead of {setup.seq} tokens fit at a batch of {setup.batch}"
    if setup.optimizer in ("adamw", "adamw-fused") and setup.method == "full":
        yield from tell("an 8-bit optimizer (--optimizer adamw8bit)", optimizer="adamw8bit")
        yield from tell("a paged 8-bit optimizer (--optimizer paged-adamw8bit)", optimizer="paged-adamw8bit")
    if setup.method == "full":
        yield from tell("LoRA (--method lora)", method="lora")
    if setup.method != "qlora":
        yield from tell("QLoRA in 4 bits (--method qlora)", method="qlora")
    low = lowest(recorded, effort=_QUICK)
    cards = sorted((g for g in map(gpu, gpu_names()) if g.kind == device.kind), key=lambda g: g.memory_bytes)
    first = bisect.bisect_left(cards, True, key=lambda g: _reserved(recorded, low, usable_bytes(g)) is not None)
    larger = cards[first:]
    if larger:
        yield (
            f"a card with {format_bytes(larger[0].memory_bytes)} is the smallest in the catalog that holds it "
            f"({', '.join(g.name for g in larger if g.memory_bytes == larger[0].memory_bytes)})"
        )


# --------------------------------------------------------------------------------------- what is said


def _essence(recorded: Trace, made: Plan) -> Iterable[str]:
    """The plan in at most four lines."""
    planned = [choice for choice in made.choices if not choice.keeps_all]
    if not made.replays:
        how = "in tiles" if not made.exact else "with the loss in place" if made.in_place_loss else "as it is"
        yield f"nothing is recomputed: the step fits {how}"
        if made.exact:
            return
    if made.tiling is not None:
        yield f"tiles: {tiles_said(made)}"
    yield f"{len(planned)} of {len(recorded.units)} units recompute part of what they make, {made.replays} replays"
    share = made.recompute_flops / made.forward_flops if made.forward_flops else 0.0
    yield f"recompute: {share:.1%} of the forward's FLOPs, plan {made.status.value}"
    yield f"peak {format_bytes(made.peak_bytes)} of {format_bytes(made.unplanned_peak_bytes)} without a plan" + (
        ", the loss makes its gradient in place" if made.in_place_loss else ""
    )


def _error_bar(device: Device) -> str:
    return (
        f"live bytes: within {WORST_ERROR:.3%} of the CPU allocator's count on {ERROR_CASES} measured steps "
        "(benchmarks/forecast.py); the "
        + (
            "kernels of this device were not measured on a GPU"
            if device.kind != "cpu"
            else "kernels are this machine's"
        )
        + f", so {MARGIN:.0%} and {format_bytes(CONTEXT_BYTES)} for the driver are kept free; seconds are estimated "
        "from the maker's rates"
    )


#: From benchmarks/results/forecast.json; a test compares.
WORST_ERROR, ERROR_CASES = 0.00005, 72


def _kept_whole(recorded: Trace) -> Iterable[str]:
    reasons = sorted({unit.pinned for unit in recorded.units if unit.pinned})
    if reasons:
        count = sum(bool(unit.pinned) for unit in recorded.units)
        yield f"tightfit keeps {count} of {len(recorded.units)} units whole: {'; '.join(reasons)}"


def _notes(setup: Setup, device: Device) -> Iterable[str]:
    if device.kind in ("rocm", "mps"):
        yield f"{device.name}: kernels are taken to be CUDA's, which {device.kind}'s resemble but are not"
    if device.compute_capability is not None and device.compute_capability < 8.0 and setup.dtype.startswith("bf16"):
        yield f"{device.name} has no bfloat16 units, so bf16 runs at float32 speed there: use fp16"
    config = _model(setup.model, setup.method, setup.dtype, setup.rank).config
    if getattr(config, "quantization_config", None) is not None:
        yield "the config names a quantisation of its own, which is not forecast: weights count in their plain dtype"
    if setup.method == "qlora":
        left = sum(p.numel() * p.element_size() for p in _packed_not(setup))
        if left:
            yield f"{format_bytes(left)} of expert weights are no torch.nn.Linear: bitsandbytes leaves them as they are"
    if device.name[:1].isdigit():
        yield "for a size alone, seconds are those of an A100's rates"


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


def _spread_notes(setup: Setup, recorded: Trace) -> Iterable[str]:
    if setup.strategy == Strategy.ONE.value:
        return
    gathered, reduced = sent_bytes(recorded, setup)
    yield (
        f"each of {setup.world_size} ranks by {setup.strategy}, with a batch of its own; the figures are rank 0's, "
        "which never holds less than another"
    )
    yield (
        f"a rank receives {format_bytes(gathered)} of weights and sends {format_bytes(reduced)} of gradients in a "
        "step; the time of that is not in the seconds, nor are buffers that a library keeps outside torch's allocator"
    )
    if setup.strategy == Strategy.DDP.value:
        yield "DDP without gradient_as_bucket_view; with it, the gradients' bytes are saved"


# ---------------------------------------------------------------------------------------- the worst batch


#: No more of a file of lengths is read.
MOST_LENGTHS_BYTES = 1 << 30


def longest_length(path: str | Path) -> tuple[int, str]:
    """The longest example in a file of lengths, and one line that says what was looked at.

    A histogram `{"length": count}`, a list of lengths, one length a line, or JSON lines with `input_ids`, at most
    `MOST_LENGTHS_BYTES` in all. Raises `InvalidInput` for anything else.
    """
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):  # a pipe or a device may never end
            raise InvalidInput(f"cannot read the lengths in {str(path)!r}: it is not a regular file")
        with open(path, "rb") as file:
            content = file.read(MOST_LENGTHS_BYTES + 1)
        if len(content) > MOST_LENGTHS_BYTES:
            raise InvalidInput(
                f"{str(path)!r} holds more than {format_bytes(MOST_LENGTHS_BYTES)}, which is as much as is read: "
                "give a histogram of the lengths"
            )
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"cannot read the lengths in {str(path)!r}: {error}") from None
    try:
        lengths = _lengths_in(text)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        raise InvalidInput(
            f"{str(path)!r} holds no lengths: expected a JSON object of length and count, a list, a number a line, "
            'or JSON lines with "input_ids"'
        ) from None
    if not lengths or max(lengths) < 1:
        raise InvalidInput(f"{str(path)!r} holds no lengths")
    total = sum(lengths.values())
    mean = sum(length * count for length, count in lengths.items()) / total
    longest = max(lengths)
    return longest, f"planned for the longest of {total:,} examples: {longest} tokens (the mean is {mean:.0f})"


def _lengths_in(text: str) -> dict[int, int]:
    try:
        data = json.loads(text)
    except ValueError:
        data = None
    if isinstance(data, dict) and "input_ids" not in data:
        return {int(length): int(count) for length, count in data.items() if int(count) > 0}
    if isinstance(data, list) and all(isinstance(item, int) for item in data):
        return dict(Counter(data))
    lines = [line for line in text.splitlines() if line.strip()]
    return dict(
        Counter(len(json.loads(line)["input_ids"]) if line.lstrip().startswith("{") else int(line) for line in lines)
    )


# ------------------------------------------------------------------------------------------- calibration


def calibrated(name: str, device: torch.device) -> str:
    """TOML of this machine's own `device` under `name`, every rate measured here: the median of five runs."""
    cuda = device.type == "cuda"
    size = 8192 if cuda else 1536

    def seconds(run: Callable[[], Any]) -> float:
        times = []
        for _ in range(6):
            if cuda:
                torch.cuda.synchronize(device)
            started = time.perf_counter()
            run()
            if cuda:
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - started)
        return statistics.median(times[1:])

    rates = {}
    for label, dtype in (("fp32", torch.float32), ("half", torch.bfloat16)):
        a = torch.randn(size, size, device=device).to(dtype)
        rates[label] = 2 * size**3 / seconds(functools.partial(torch.mm, a, a)) / 1e12
    block = torch.empty((1 << 30 if cuda else 1 << 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(block)
    moved = 2 * block.numel() / seconds(lambda: target.copy_(block)) / 1e9
    link = moved
    if cuda:
        host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
        link = host.numel() / seconds(lambda: target[: host.numel()].copy_(host, non_blocking=True)) / 1e9
    memory = torch.cuda.get_device_properties(device).total_memory if cuda else int(environment()["memory_bytes"])
    capability = ".".join(map(str, torch.cuda.get_device_capability(device))) if cuda else ""
    lines = [
        f"[gpus.{name}]", f"memory_gib = {memory / 2**30:.3f}", f"memory_gb_per_second = {moved:.1f}",
        f"fp32_tflops = {rates['fp32']:.4f}", f"half_tflops = {rates['half']:.4f}", "bf16 = true",
        f"pcie_gb_per_second = {link:.1f}", f'kind = "{device.type}"',
        *([f"compute_capability = {capability}"] if capability else []),
        f'source = "measured here: {environment()["platform"]}, torch {torch.__version__}"',
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _packed_not(setup: Setup) -> list[nn.Parameter]:
    """Stacked expert weights (three dimensions), which bitsandbytes' layers do not take."""
    model = _model(setup.model, setup.method, setup.dtype, setup.rank)
    return [p for p in model.parameters() if p.dim() == 3 and not p.requires_grad]


# ------------------------------------------------------------------------------------------ all GPUs


def which_gpus(setup: Setup, *, budget: str | int | None = None, progress: Progress = lambda _: None) -> list[Forecast]:
    """A forecast, without searches, for every GPU of the catalog: those that run it first, fastest first."""
    setup.checked()
    if budget is not None:
        require_part(budget, "a device")
    traces: dict[tuple[str, bool, int], Trace] = {}
    found = []
    for name in gpu_names():
        device = gpu(name)
        progress(f"planning for {name}")
        step = FakeStep(device)
        kernels = (device.kind, step.flash, step.workspace_bytes)  # devices that take the same share a trace
        if kernels not in traces:
            traces[kernels] = trace_setup(setup, device)
        recorded = retimed(traces[kernels], reached(device))
        room = _room(device, budget)
        base = simulate(recorded)
        modes = [_mode("none", recorded, base, None, room)]
        made = plan(recorded, base.peak_bytes) if modes[0].fits else _fitted(recorded, room, _QUICK)
        if made is not None:
            modes.append(_mode("tightfit", recorded, simulate(recorded, made), made, room))
        modes = [dataclasses.replace(m, slowdown=m.step_seconds / modes[0].step_seconds) for m in modes]
        found.append(
            Forecast(
                model=setup.model, method=setup.method, batch=setup.batch, seq=setup.seq, dtype=setup.dtype,
                optimizer=setup.optimizer, gpu=name, gpu_bytes=device.memory_bytes, usable_bytes=room,
                fits=made is not None, modes=tuple(modes), plan=made, essence=(), largest_batch=None, longest_seq=None,
                advice=(), error_bar=_error_bar(device), notes=(*_kept_whole(recorded), *_notes(setup, device)),
                environment=environment(),
            )
        )  # fmt: skip
    return sorted(found, key=lambda f: (not f.fits, f.modes[-1].step_seconds if f.fits else f.gpu_bytes))
