"""The nouns of tightfit: types, enums, errors, byte sizes, JSON.

A trace says what a step does, a plan says what to keep and what to run again, a timeline says how many
bytes are live, a proof says what was checked. All four are plain frozen data with a JSON form that carries
a schema version, so that a decision made on one machine can be read, checked and applied on another.

Invariant: nothing here imports torch, and loading JSON only ever builds these types; it never runs code.
Refused here: unknown schema versions, unknown keys and values of the wrong type, all as `InvalidInput`.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import hashlib
import inspect
import json
import math
import os
import re
import stat
import sys
import tempfile
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

SCHEMA_VERSION = 1

T = TypeVar("T")


# --------------------------------------------------------------------------------------------- errors


class TightfitError(Exception):
    """Base of every error that tightfit raises on purpose. The message is one line for the user."""


class InvalidInput(TightfitError, ValueError):
    """What was asked cannot be understood; nothing was done."""


class Unsupported(TightfitError):
    """tightfit cannot do this without risking a wrong gradient, so it does not do it at all."""


class PlanMismatch(TightfitError):
    """The plan was made for another model; the message names the first unit that differs."""


class ReplayDiverged(TightfitError, RuntimeError):
    """A unit did something else when it was run again, so its gradient cannot be trusted."""


class BudgetInfeasible(TightfitError):
    """No plan fits the budget.

    Attributes: `budget_bytes` asked, `least_bytes` the smallest peak of any plan found, `advice` what
    would help, one sentence each with its number.
    """

    def __init__(self, budget_bytes: int, least_bytes: int, advice: tuple[str, ...] = ()) -> None:
        self.budget_bytes = budget_bytes
        self.least_bytes = least_bytes
        self.advice = advice
        budget, least = format_apart(budget_bytes, least_bytes)
        message = f"a budget of {budget} cannot hold this step: the least that is feasible is {least}"
        super().__init__("; ".join((message, *advice)))


def reason_of(error: BaseException) -> str:
    """What `error` says, for one line: its first line, and what follows while that is only a heading ("... :")."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    said = next((count for count, line in enumerate(lines, start=1) if not line.endswith(":")), len(lines))
    return " ".join(lines[:said])


_REFUSED = re.compile(r"DefaultCPUAllocator: .*you tried to allocate ([0-9]+) bytes")


def refused_bytes(error: BaseException) -> int | None:
    """The bytes that torch asked the host for in vain, where that is what `error` says."""
    found = _REFUSED.search(str(error)) if isinstance(error, RuntimeError) else None
    return int(found[1]) if found else None


# ------------------------------------------------------------------------------------------ byte sizes

_UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)")
_PERCENT = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*%")


def parse_bytes(text: str | int, whole_bytes: int | None = None) -> int:
    """Bytes meant by `text`: `"22GiB"`, `"22GB"`, `"1500000"`, an int, or `"80%"` of `whole_bytes`.

    Raises `InvalidInput` for anything else, for zero and negative sizes, and for a percentage when there
    is no whole to take it of.
    """
    asked = f"a size such as 22GiB, 800MB or 60%, not {text!r}"
    if isinstance(text, bool) or not isinstance(text, (str, int)):
        raise InvalidInput(f"expected {asked}")
    if isinstance(text, int):
        size_bytes = text
    elif (percent := percentage(text)) is not None:
        if whole_bytes is None:
            raise InvalidInput(f"{text!r} is a percentage, but there is nothing known to take it of; give bytes")
        size_bytes = math.floor(percent / 100 * whole_bytes)
    elif size := _SIZE.fullmatch(text.strip()):
        unit = size[2].upper()
        if unit not in _UNITS:
            raise InvalidInput(f"unknown unit {size[2]!r} in {text!r}: use B, KB, MB, GB, TB, KiB, MiB, GiB or TiB")
        size_bytes = math.floor(Fraction(Decimal(size[1])) * _UNITS[unit])
    else:
        raise InvalidInput(f"expected {asked}")
    if size_bytes <= 0:
        raise InvalidInput(f"expected more than zero bytes, not {text!r}")
    return size_bytes


def percentage(text: str | int) -> Fraction | None:
    """The percentage that `text` asks for (`"60%"`); `None` when it asks for something else."""
    found = _PERCENT.fullmatch(text.strip()) if isinstance(text, str) else None
    return Fraction(Decimal(found[1])) if found else None


def require_part(budget: str | int, whole: str) -> None:
    """Raise `InvalidInput` when `budget` is a percentage above 100 of `whole`, which has no more than all of it."""
    percent = percentage(budget)
    if percent is not None and percent > 100:
        raise InvalidInput(f"a budget of {budget!r} is more than all of {whole}: give 100% or less, or a size")


def format_bytes(size_bytes: float, more_digits: int = 0) -> str:
    """`size_bytes` for people: `1.50 GiB`, `12.0 MiB`, `512 B`."""
    for unit, step in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(size_bytes) >= step:
            amount = size_bytes / step
            return f"{amount:.{(2 if amount < 10 else 1) + more_digits}f} {unit}"
    return f"{int(size_bytes)} B"


def format_apart(one_bytes: int, other_bytes: int) -> tuple[str, str]:
    """Two sizes for people, with as many digits as it takes to tell them apart: `11.08 MiB`, `11.11 MiB`."""
    texts = (format_bytes(one_bytes), format_bytes(other_bytes))
    for digits in range(1, 13):
        if texts[0] != texts[1] or one_bytes == other_bytes:
            break
        texts = (format_bytes(one_bytes, digits), format_bytes(other_bytes, digits))
    return texts


# ----------------------------------------------------------------------------------------------- enums


class Kind(enum.Enum):
    """How an op treats memory and randomness; decides how the planner may use it."""

    PURE = "pure"  # same inputs, same fresh outputs
    VIEW = "view"  # outputs share an input's storage; no bytes of their own
    INPLACE = "inplace"  # writes a value that an earlier op of the same unit made
    RANDOM = "random"  # draws from a torch generator
    OPAQUE = "opaque"  # anything else: must not be run twice


class Phase(enum.Enum):
    FORWARD = "forward"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"


class Action(enum.Enum):
    """What becomes of one value between forward and backward."""

    KEEP = "keep"
    RECOMPUTE = "recompute"
    OFFLOAD = "offload"


class Status(enum.Enum):
    OPTIMAL = "optimal"  # proven: no plan of the stated model takes fewer seconds
    FEASIBLE = "feasible"  # fits; `Plan.bound_seconds` is the proven lower bound
    INFEASIBLE = "infeasible"


class Lever(enum.Enum):
    """What a plan may do to take bytes down; `plan(..., levers=)` names those that it may use."""

    RECOMPUTE = "recompute"  # units drop values and make them again
    LOSS_IN_PLACE = "loss_in_place"  # the loss makes its gradient in place of what it saved
    TILE = "tile"  # head and loss, and token-wise modules, a tile of rows at a time; not bit for bit
    NEST = "nest"  # units grouped, so that only some unit inputs are kept
    OFFLOAD = "offload"  # kept values moved to host memory


def levers_named(asked: Collection[Lever | str] | str | None) -> frozenset[Lever] | None:
    """Levers and names of levers as levers; text as `parse_levers` reads it; `None`, the default, stays.

    Raises `InvalidInput` for what is none.
    """
    if asked is None or isinstance(asked, str):
        return None if asked is None else parse_levers(asked)
    found: set[Lever] = set()
    for each in asked:
        if isinstance(each, Lever):
            found.add(each)
        elif isinstance(each, str) and each.replace("-", "_") in {lever.value for lever in Lever}:
            found.add(Lever(each.replace("-", "_")))
        else:
            raise InvalidInput(_no_lever(each))
    return frozenset(found)


def _no_lever(name: object) -> str:
    known = [lever.value for lever in Lever]
    close = difflib.get_close_matches(str(name).replace("-", "_"), known, n=1)
    return f"unknown lever {name!r}{f'; did you mean {close[0]!r}?' if close else ''}: use {', '.join(known)}"


def parse_levers(text: str) -> frozenset[Lever] | None:
    """Levers named in `text`: `"recompute,nest"`, `"all"`, and `"all,-tile"` for all but one. Empty: the default.

    Raises `InvalidInput` for a name that is none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        return None
    known = {lever.value: lever for lever in Lever}
    chosen: set[Lever] = set()
    for name in names:
        key = name.removeprefix("-").replace("-", "_")
        if key not in known and name != "all":
            raise InvalidInput(f"{_no_lever(name)}, all, or a minus before one, as in all,-tile")
        if name == "all":
            chosen |= set(Lever)
        elif name.startswith("-"):
            chosen -= {known[key]}
        else:
            chosen.add(known[key])
    return frozenset(chosen)


class Happening(enum.Enum):
    """What an `Event` records."""

    OP = "op"  # op `subject` ran
    ALLOC = "alloc"  # value `subject` came to life
    FREE = "free"  # value `subject` was given back
    LOAD = "load"  # backward read saved tensor `subject`
    RELEASE = "release"  # autograd let go of saved tensor `subject`
    ENTER = "enter"  # frame `subject` began its forward
    EXIT = "exit"  # frame `subject` ended its forward


class Category(enum.Enum):
    """Whose bytes are live; the rows of a timeline."""

    PARAMETERS = "parameters"
    QUANTISED = "quantised_parameters"  # packed weights and their scales
    GRADIENTS = "gradients"
    OPTIMIZER_STATE = "optimizer_state"
    BUFFERS = "buffers"
    INPUTS = "inputs"
    WORKSPACE = "workspace"  # what a library keeps for its kernels, once asked for
    COLLECTIVES = "collectives"  # weights gathered from other processes, and the buffers of gathering and reducing
    SAVED = "saved"
    LOSS = "loss"  # made between the last unit's forward and its backward: logits, loss, their gradients
    TEMPORARIES = "temporaries"


# ----------------------------------------------------------------------------------------------- types


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """One storage. Views of it and in-place versions of it are the same value."""

    id: int
    size_bytes: int
    dtype: str
    shape: tuple[int, ...]
    producer: int | None  # op id; None: alive before the step, or made outside any op
    unit: str | None  # path of the unit whose frame made it
    needed: bool  # backward reads it
    ordinal: int | None = None  # position among the values of its frame
    natural_end: int | None = None  # event after which nothing but autograd holds it; None: until its FREE
    category: Category = Category.TEMPORARIES  # what its bytes count as while nothing in forward saved it


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One call below autograd, as the dispatcher saw it."""

    id: int
    unit: str | None
    ordinal: int | None  # position among the counted ops of its frame
    name: str
    inputs: tuple[int, ...]  # value ids read
    outputs: tuple[int | None, ...]  # value id of each tensor output; None: a result that is no tensor
    seconds: float
    flops: int
    kind: Kind
    phase: Phase
    frame: int | None = None
    scratch_bytes: int = 0  # most bytes the kernel held beyond its outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """One tensor that autograd saved in forward."""

    id: int
    value: int
    frame: int | None  # frame that was open when it was saved
    ordinal: int | None  # position among the tensors saved in that frame
    read: bool  # backward asked for it


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    what: Happening
    subject: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One call of a unit."""

    id: int
    unit: str
    inputs: tuple[int, ...]  # value ids of its tensor arguments, each once, in the order of the call


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One op of a unit's program; numbers are value ordinals of the unit."""

    name: str
    kind: Kind
    reads: tuple[int, ...] = ()  # values it needs in their final state
    reads_early: tuple[int, ...] = ()  # values it reads before a later in-place op changes them
    outputs: tuple[int | None, ...] = ()  # per tensor output; -1: storage from outside the unit; None: no tensor
    writes: tuple[int, ...] = ()  # values that it makes or changes
    rerunnable: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What a unit does, free of sizes: the ops in order and the tensors that autograd saves.

    `slots[i]` is the value ordinal of the i-th saved tensor, or -1 when its storage comes from outside the
    unit. `wanted[i]` says that backward really reads it.
    """

    steps: tuple[Step, ...]
    slots: tuple[int, ...]
    wanted: tuple[bool, ...]
    values: int  # how many values the unit makes
    held: tuple[int, ...] = ()  # values that stay alive whatever the plan says (Python or a ctx holds them)

    def __hash__(self) -> int:  # programs are looked up often, and hashing every step costs more than the answer
        return hash((len(self.steps), self.values, self.slots))

    @property
    def needed(self) -> tuple[int, ...]:
        """Ordinals of the unit's own values that backward reads, ascending."""
        return tuple(sorted({v for v, want in zip(self.slots, self.wanted, strict=True) if want and v >= 0}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    path: str
    digest: str  # equal blocks share one frontier: structure and sizes
    op_ids: tuple[int, ...]
    signature: str = ""  # class and parameter shapes; a plan for another model is told by it
    pinned: str = ""  # why this unit must keep everything; empty: it need not


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """A cross entropy outside the units whose gradient can be made in place (`tightfit.loss`); op ids."""

    log_softmax: int
    nll_backward: int
    softmax_backward: int
    rows_bytes: int  # of the rows that are made at once


@dataclass(frozen=True, slots=True, kw_only=True)
class TiledModule:
    """A token-wise module of a unit, computed over chunks of the tokens."""

    name: str  # its path within the unit
    tiles: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """What of a step is computed a tile of rows at a time (`tightfit.tiles`)."""

    head: str | None = None  # path of the head module; none: the head is not tiled
    rows: int = 0  # of a tile of logits
    modules: tuple[TiledModule, ...] = ()  # in every unit that has a module of the name


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """One recorded step: what ran, what lived, what autograd held, in order."""

    units: tuple[Unit, ...]
    frames: tuple[Frame, ...]
    ops: tuple[Op, ...]
    values: tuple[Value, ...]
    saved: tuple[Saved, ...]
    events: tuple[Event, ...]
    programs: Mapping[int, Program]  # by frame id
    static_bytes: Mapping[str, int]  # by category
    device: str
    environment: Mapping[str, str]
    digest: str
    batch_sizes: tuple[int, ...] = ()  # leading sizes of the batch's tensors, for advice
    random_state_bytes: int = 0  # one saved generator state
    notes: tuple[str, ...] = ()
    losses: tuple[Loss, ...] = ()
    out_bytes_per_second: float = 0.0  # of copies from the device to the host
    back_bytes_per_second: float = 0.0
    copies_beside: bool = False  # do copies run beside the compute?
    resharded: bool = False  # a unit's weights are only there while it runs, so no other unit can have it made again
    tiling: Tiling | None = None  # what was in force when the step was recorded
    tiled: tuple[Trace, ...] = ()  # the same step, recorded with tiles in force


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    name: str
    memory_bytes: int
    flops_per_second: Mapping[str, float]
    memory_bytes_per_second: float
    h2d_bytes_per_second: float
    d2h_bytes_per_second: float
    source: str
    kind: str = "cpu"  # cpu, cuda, rocm, mps
    compute_capability: float | None = None  # 8.9; NVIDIA only


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What one unit does with each value that it makes, by ordinal."""

    unit: str
    actions: tuple[Action, ...]
    tiles: int = 1
    signature: str = ""
    program: str = ""  # key into `Plan.programs`
    inputs: tuple[Action, ...] = ()  # of what it is given, as in `Frame.inputs`; RECOMPUTE: the unit before makes it
    lends: tuple[int, ...] = ()  # values that it makes again for units whose inputs are not kept

    @property
    def keeps_all(self) -> bool:
        return not self.lends and all(action is Action.KEEP for action in (*self.actions, *self.inputs))


@dataclass(frozen=True, slots=True, kw_only=True)
class Advance:
    """One sweep in backward that makes a unit's input again by running the units before it: from `base`, whose input is
    there, up to `target`, whose backward asks. `stores`: units on the way whose inputs stay for their own backward."""

    base: str
    target: str
    stores: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Decisions as data: which values each unit keeps, and what that is known to cost."""

    budget_bytes: int
    choices: tuple[Choice, ...]
    status: Status
    peak_bytes: int
    step_seconds: float
    recompute_seconds: float
    bound_seconds: float  # no plan recomputes in less, under the planner's model
    recompute_flops: int
    forward_flops: int
    unplanned_peak_bytes: int
    replays: int  # frames replayed in a step
    trace_digest: str
    versions: Mapping[str, str]
    programs: Mapping[str, Program] = field(default_factory=dict)
    in_place_loss: bool = False  # the loss makes its gradient in place of what it saved; costs no recompute
    advances: tuple[Advance, ...] = ()  # in the order of backward
    tiling: Tiling | None = None  # what is computed in tiles; none: nothing
    tile_seconds: float = 0.0  # what the tiles cost
    offloaded_bytes: int = 0  # that wait off the device
    offload_seconds: float = 0.0  # that the step waits for copies, estimated
    solved_by: tuple[str, ...] = ()  # the solver and the ways that found the points and chose among them

    @property
    def exact(self) -> bool:
        """Are loss and gradients bit for bit those of the step without the plan? Tiles add sums in another order."""
        return self.tiling is None

    @property
    def decisions(self) -> str:
        """Digest of what the plan has the engine do: equal where two plans differ only in what they say it costs."""
        does = [self.choices, self.programs, self.in_place_loss, self.advances, self.tiling]
        return hashlib.sha256(json.dumps(to_json(does), sort_keys=True).encode()).hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON: whole or not at all."""
        write_text(path, dumps(self))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan. Raises `InvalidInput` when the file cannot be read or is no plan."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInput(f"cannot read the plan {str(path)!r}: {error}") from None
        return loads(cls, text, source=str(path))


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Live bytes through a simulated step. `live_bytes[i]` and each `by_category[c][i]` belong to `labels[i]`."""

    labels: tuple[str, ...]
    live_bytes: tuple[int, ...]
    by_category: Mapping[str, tuple[int, ...]]
    peak_bytes: int
    peak_event: int
    peak_owner: str
    recompute_seconds: float
    recompute_flops: int
    replays: int
    offloaded_bytes: int = 0  # copied off the device in forward
    fetched_bytes: int = 0  # copied back in backward


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    name: str
    expected: str
    measured: str
    tolerance: str
    passed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    checks: tuple[Check, ...]
    environment: Mapping[str, str]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def __getitem__(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way to run a step, measured."""

    mode: str  # none, every-block, tightfit
    peak_bytes: int  # of the whole step, by the allocator's own count
    predicted_peak_bytes: int
    activation_peak_bytes: int  # peak minus what was live before the step
    step_seconds: float  # median
    recompute_flops: int
    forward_flops: int
    gradients: str  # reference, identical, differs; within tolerance: a plan with tiles, held against float64


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """The same step with and without checkpointing, side by side."""

    model: str
    method: str
    batch: int
    seq: int
    dtype: str
    device: str
    environment: Mapping[str, str]
    rows: tuple[Row, ...]
    budget_bytes: int
    plan: Plan
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """One way to run a step on a device that is not there. Bytes are forecast, seconds estimated."""

    mode: str  # none, every-block, tightfit
    fits: bool
    peak_bytes: int  # allocated
    reserved_bytes: int  # what the caching allocator takes from the driver for it
    by_category: Mapping[str, int]  # at the peak; allocator_slack is reserved minus allocated
    peak_owner: str
    peak_phase: str  # forward, backward, optimizer
    step_seconds: float  # estimated
    slowdown: float  # step seconds against mode none's
    recompute_flops: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """The answer to "will it run?" for one model, method, batch and device."""

    model: str
    method: str
    batch: int
    seq: int
    dtype: str
    optimizer: str
    gpu: str
    gpu_bytes: int
    usable_bytes: int  # for the allocator: without the driver's context and the margin
    fits: bool
    modes: tuple[Mode, ...]
    plan: Plan | None  # none when nothing fits
    essence: tuple[str, ...]  # the plan in a few lines
    # with tiles only if the asked size needs them; none: not looked for
    largest_batch: int | None  # with tightfit, at this sequence
    longest_seq: int | None  # with tightfit, at this batch, in steps of 64 tokens
    advice: tuple[str, ...]  # what would make it fit, each with its number
    error_bar: str
    notes: tuple[str, ...]
    environment: Mapping[str, str]


# ------------------------------------------------------------------------------------------------ JSON


def to_json(thing: Any) -> Any:
    """`thing` as JSON-ready dicts, lists, strings and numbers. Enums become their value."""
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        return {f.name: to_json(getattr(thing, f.name)) for f in dataclasses.fields(thing)}
    if isinstance(thing, enum.Enum):
        return thing.value
    if isinstance(thing, Mapping):
        return {str(key): to_json(value) for key, value in thing.items()}
    if isinstance(thing, (tuple, list)):
        return [to_json(item) for item in thing]
    return thing


def dumps(thing: Any) -> str:
    """JSON text of one of the types above, with its name and the schema version."""
    return json.dumps({"type": type(thing).__name__, "schema_version": SCHEMA_VERSION, **to_json(thing)}) + "\n"


def loads(cls: type[T], text: str, source: str = "the text") -> T:
    """The `cls` that `dumps` wrote. Raises `InvalidInput` for any other text."""
    name = cls.__name__.lower()
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{source} is not JSON ({error}); expected a tightfit {name}") from None
    if not isinstance(data, dict) or data.pop("type", None) != cls.__name__:
        raise InvalidInput(f"{source} is JSON, but no tightfit {name}")
    version = data.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise InvalidInput(
            f"{source} has schema version {version}, this tightfit reads {SCHEMA_VERSION}: make the {name} anew"
        )
    try:
        return typing.cast(T, _from_json(cls, data, name))
    except InvalidInput as error:
        raise InvalidInput(f"{source} is no valid tightfit {name}: {error}") from None


def _from_json(annotation: Any, data: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return _dataclass_from_json(annotation, data, where)
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        try:
            return annotation(data)
        except ValueError:
            raise InvalidInput(f"{where} is {data!r}") from None
    if origin in (typing.Union, types.UnionType):
        if data is None and type(None) in arguments:
            return None
        (inner,) = (a for a in arguments if a is not type(None))
        return _from_json(inner, data, where)
    if origin is tuple:
        if not isinstance(data, list):
            raise InvalidInput(f"{where} should be a list")
        return tuple(_from_json(arguments[0], item, where) for item in data)
    if origin is Mapping:
        if not isinstance(data, dict):
            raise InvalidInput(f"{where} should be an object")
        return {
            _from_key(arguments[0], key, where): _from_json(arguments[1], item, where) for key, item in data.items()
        }
    if annotation is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if not isinstance(data, annotation) or (isinstance(data, bool) and annotation is not bool):
        raise InvalidInput(f"{where} should be {annotation.__name__}, not {data!r}"[:200])
    return data


def _from_key(annotation: Any, key: str, where: str) -> Any:
    try:
        return annotation(key)
    except ValueError:
        raise InvalidInput(f"{where} has the key {key!r}") from None


def _dataclass_from_json(cls: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise InvalidInput(f"{where} should be an object")
    hints = typing.get_type_hints(cls)
    if unknown := sorted(set(data) - set(hints)):
        raise InvalidInput(f"{where} has the unknown key {unknown[0]!r}")
    required = {
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - set(data)):
        raise InvalidInput(f"{where} lacks {missing[0]!r}")
    return cls(**{key: _from_json(hints[key], item, f"{where}.{key}") for key, item in data.items()})


def make_verb(module_name: str, function: typing.Callable[..., Any]) -> None:
    """Let the module `module_name` be called as `function`.

    `tightfit.trace` is both a module and a verb of the public API. Importing a submodule binds its name in the
    package, so a function of that name would come and go with the order of imports; a module that can be called
    is always both.
    """
    module = sys.modules[module_name]

    class Verb(types.ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

    module.__class__ = Verb
    module.__dict__["__signature__"] = inspect.signature(function)


def output_file(path: str | Path) -> Path:
    """The file that writing to `path` makes or replaces: where `path` is a symbolic link, what it points to.

    Raises `InvalidInput` where there is no folder for it, and where something is that is no regular file: a rename over
    a device or a pipe would take it away from everybody.
    """
    target = Path(os.path.realpath(path))
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        if not target.parent.is_dir():
            raise InvalidInput(f"cannot write to {str(path)!r}: there is no folder {str(target.parent)!r}") from None
        return target
    except (OSError, ValueError) as error:
        raise InvalidInput(f"cannot write to {str(path)!r}: {error}") from None
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise InvalidInput(f"cannot write to {str(path)!r}: it is {what}, which is not replaced")
    return target


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write `content` to `path` by way of a temporary file beside it, so that no reader sees half of it.

    A symbolic link is written through. Raises `InvalidInput` as `output_file` does.
    """
    target = output_file(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise InvalidInput(f"cannot write {str(path)!r}: {error}") from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only their owner can read
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
