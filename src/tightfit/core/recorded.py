"""The nouns of a recorded step: ops, values, events, units and their programs.

Invariant: everything here is frozen data that survives a round trip through JSON; no torch.
"""

from __future__ import annotations

import enum
import weakref
from collections.abc import Mapping
from dataclasses import dataclass

#: What torch calls the host; every other kind of device is a card.
HOST_KIND = "cpu"


class Kind(enum.Enum):
    """How an op treats memory and randomness; decides how the planner may use it."""

    PURE = "pure"  # same inputs, same fresh outputs
    VIEW = "view"  # outputs share an input's storage; no bytes of their own
    INPLACE = "inplace"  # writes a value that an earlier op of the same unit made
    RANDOM = "random"  # draws from a torch generator
    OPAQUE = "opaque"  # anything else: must not be run twice

    __hash__ = object.__hash__  # Enum's own is written in Python, and planning looks members up by the million


class Phase(enum.Enum):
    FORWARD = "forward"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"

    __hash__ = object.__hash__  # Enum's own is written in Python, and planning looks members up by the million


class EventKind(enum.Enum):
    """What an `Event` records."""

    OP = "op"  # op `subject` ran
    ALLOC = "alloc"  # value `subject` came to life
    FREE = "free"  # value `subject` was given back
    LOAD = "load"  # backward read saved tensor `subject`
    RELEASE = "release"  # autograd let go of saved tensor `subject`
    ENTER = "enter"  # frame `subject` began its forward
    EXIT = "exit"  # frame `subject` ended its forward
    READY = "ready"  # value `subject` is a parameter's whole gradient

    __hash__ = object.__hash__  # Enum's own is written in Python, and planning looks members up by the million


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

    __hash__ = object.__hash__  # Enum's own is written in Python, and planning looks members up by the million


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
    scratch_again_bytes: int | None = None  # the same where a replay runs it; none: as many
    sums_tied: bool = False  # it sums gradients of a tied weight, and could write over the first (`step.tied`)

    @property
    def rerun_scratch_bytes(self) -> int:
        return self.scratch_bytes if self.scratch_again_bytes is None else self.scratch_again_bytes


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
    what: EventKind
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


@dataclass(frozen=True, slots=True, kw_only=True, weakref_slot=True)
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

    def __hash__(self) -> int:  # programs are looked up often, and hashing all of a long one costs more than the answer
        ends = self.slots[:_HASHED], self.slots[-_HASHED:], self.wanted[-_HASHED:], self.held[:_HASHED]
        return hash((len(self.steps), self.values, len(self.slots), ends))

    def the_first(self) -> Program:
        """The first program that is equal to this one and is still in use.

        What is worked out for a program is found again by it. Comparing two equal programs of a large block op by op
        takes longer than most of that work, so equal ones become one object.
        """
        known = _PROGRAMS.get(self)
        first = None if known is None else known()
        if first is None:
            first = self
            _PROGRAMS[self] = weakref.ref(self)
        return first

    @property
    def needed(self) -> tuple[int, ...]:
        """Ordinals of the unit's own values that backward reads, ascending."""
        return tuple(sorted({v for v, want in zip(self.slots, self.wanted, strict=True) if want and v >= 0}))


#: So many of a program's saved tensors, at either end, are in its hash.
_HASHED = 16

_PROGRAMS: weakref.WeakKeyDictionary[Program, weakref.ref[Program]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    path: str
    digest: str  # equal blocks share one frontier: structure and sizes
    op_ids: tuple[int, ...]
    signature: str = ""  # class and parameter shapes; a plan for another model is told by it
    pinned: str = ""  # why this unit must keep everything; empty: it need not


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """A cross entropy outside the units whose gradient can be made in place (`levers.loss_in_place`); op ids."""

    log_softmax: int
    nll_backward: int
    softmax_backward: int
    rows_bytes: int  # of the rows that are made at once


@dataclass(frozen=True, slots=True, kw_only=True)
class RowwiseOps:
    """Ops of a loss outside the units that work row by row, and can be run a few rows at a time; op ids."""

    first: int
    last: int
    rows: int  # all of them are the first dimension of what the ops make
    rows_at_once: int
    buffer: int  # value id of what holds the logits, one tile after the other
    buffer_bytes: int  # of as many columns as these ops need


@dataclass(frozen=True, slots=True, kw_only=True)
class TiledModule:
    """A token-wise module of a unit, computed over chunks of the tokens."""

    name: str  # its path within the unit
    tiles: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """What of a step is computed a tile of rows at a time (`levers.tile`)."""

    head: str | None = None  # path of the head module; none: the head is not tiled
    rows: int = 0  # of a tile of logits
    modules: tuple[TiledModule, ...] = ()  # in every unit that has a module of the name


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """What runs in one piece, with numbers of its own: ops and values count from 0, and events refer to these."""

    ops: tuple[Op, ...]
    values: tuple[Value, ...]
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterBytes:
    """Bytes of a trained parameter and of what the optimizer keeps for it."""

    dtype: str
    size_bytes: int
    state_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerPart:
    """The optimizer's step for some parameters: what runs, and whose step it is. Only what it makes is among its
    values."""

    stretch: Stretch
    parameters: tuple[ParameterBytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerStep:
    """The optimizer's step at the end of a trace, and other ways to take it that give the same bits."""

    ops: int  # of the trace before the step; it has the rest
    values: int
    events: int
    chunk_bytes: int = 0  # most bytes of parameters that are stepped at once in the other ways
    sliced: bool = False  # a larger parameter is stepped by slices of its rows
    in_chunks: tuple[OptimizerPart, ...] = ()
    alone: tuple[OptimizerPart, ...] = ()  # one parameter each: one for each dtype and shape
    refused: str = ""  # why there are no other ways; empty: there may be
    waits_from_bytes: int | None = None  # state of parameters of so many bytes waits in host memory; none: nobody's
    waits_some: int = 0  # and that of so many smaller ones, the first
    waits_some_from_bytes: int = 0  # that are not smaller than this
    gradients_wait_from_bytes: int | None = None  # gradients of so many bytes do; none: nobody's
    state_ahead: bool = False  # state that waits comes while the part before is stepped, and leaves during the next
    clipped: bool = False  # gradients are clipped by their total norm, which has to be known before the first is used


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenWeights:
    """The frozen weights of one module. Nothing reads them outside the spans, but for backward between the LOAD and the
    RELEASE of a saved tensor of theirs, and replays of the spans' ops."""

    module: str
    values: tuple[int, ...]
    is_quantised: bool
    spans: tuple[tuple[int, int], ...]  # op ids, first and end: calls of the module, and backward nodes of its own


@dataclass(frozen=True, slots=True, kw_only=True, weakref_slot=True)
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
    rowwise: tuple[RowwiseOps, ...] = ()
    out_bytes_per_second: float = 0.0  # of copies from the device to the host
    back_bytes_per_second: float = 0.0
    copies_beside: bool = False  # do copies run beside the compute?
    resharded: bool = False  # a unit's weights are only there while it runs, so no other unit can have it made again
    tiling: Tiling | None = None  # what was in force when the step was recorded
    tiled: tuple[Trace, ...] = ()  # the same step, recorded with tiles in force
    optimizer: OptimizerStep | None = None  # none: the trace has no optimizer's step
    expandable_segments: bool = False  # of the allocator that the step runs on
    calibration: str = ""  # one line: where rates that were measured on the device come from
    fresh_seconds_per_byte: float = 0.0  # that a byte less at the peak saves, of touching new memory; 0: not known
    frozen: tuple[FrozenWeights, ...] = ()  # those that need not be on the device all the time

    def __post_init__(self) -> None:
        one_each = {frame: program.the_first() for frame, program in self.programs.items()}
        object.__setattr__(self, "programs", one_each)

    def __repr__(self) -> str:
        """One line for a prompt: a whole trace is megabytes of text. `to_json` writes all of it."""
        return (
            f"<Trace {self.digest}: {len(self.units)} units, {len(self.ops)} ops, {len(self.values)} values, "
            f"{len(self.saved)} saved tensors, on {self.device}>"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    name: str
    memory_bytes: int
    flops_per_second: Mapping[str, float]
    memory_bytes_per_second: float
    h2d_bytes_per_second: float
    d2h_bytes_per_second: float
    source: str
    kind: str = HOST_KIND  # cpu, cuda, rocm, mps, xpu
    compute_capability: float | None = None  # 8.9; NVIDIA only
    # None: estimated; a number was measured on the device itself (`tightfit calibrate`)
    usable_bytes: int | None = None  # what an allocator can have of the memory
    workspace_bytes: int | None = None  # what libraries keep for matrix products, forward and backward
    launch_seconds: float | None = None  # of an op that does nothing
    expandable_segments: bool = False  # is the caching allocator set so?
    calibration: str = ""  # one line: where the measured figures come from

    @property
    def is_host(self) -> bool:
        return self.kind == HOST_KIND
