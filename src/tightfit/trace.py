"""Record one training step below autograd: every op, every storage's life, every tensor that autograd saves.

Idea: a dispatch mode sees each op after autograd has decomposed it, weak references tell when a storage dies,
and saved-tensor hooks tell what autograd holds, when backward reads it and when it lets go. Three passes over
the same step (same random state, same buffers, same gradients at the start):

1. *dry*: forward only, with every saved tensor thrown away at once. A storage that dies here dies when Python
   lets go of it; this is how long a recomputed value lives in forward.
2. *full*: forward and backward, recorded in order.
3. *scratch*: the same once more under the allocator's own recording, for the bytes that kernels use inside.

The optimizer's step is recorded on fake copies of the parameters, so nothing is updated and nothing is copied.

Invariant: the model, its gradients, its buffers and every random state are left as they were found.
Refused: steps whose three passes differ (`Unsupported`: the step is not deterministic, so no plan can be trusted).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import statistics
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import flop_registry

from tightfit.core import (
    Category,
    Device,
    Event,
    Frame,
    Happening,
    InvalidInput,
    Kind,
    Loss,
    Op,
    Phase,
    Program,
    Saved,
    Step,
    TiledModule,
    Tiling,
    Trace,
    Unit,
    Unsupported,
    Value,
    make_verb,
    to_json,
)
from tightfit.cost import NOMINAL_CPU, NOMINAL_CUDA, retimed
from tightfit.fake import FakeStep, faked, refusals_named
from tightfit.loss import rows_at_once, watched
from tightfit.parallel import (
    Strategy,
    gradients_are_views,
    inside,
    local_of,
    resharded,
    resizes_told,
    strategy_of,
    unsynchronised,
)
from tightfit.plan import Effort, every_block
from tightfit.plan.simulate import simulate_choices
from tightfit.step import (
    ForwardPatch,
    LossFunction,
    Restart,
    UnitsAsked,
    check_trainable,
    compiled_entries,
    compute_loss,
    cpu_profile,
    device_of,
    environment,
    find_units,
    no_key_value_cache,
    own_checkpointing_off,
    static_bytes_by_category,
    tensors_in,
    uncompiled,
    undisturbed,
    unique_bytes,
)
from tightfit.tiles import Sought, TileStats, head_sought, in_force, modules_sought, rows_of_tile
from tightfit.units import Census
from tightfit.unroll import trace_digest

__all__ = [
    "environment",
    "is_random",
    "is_uncounted",
    "memory_events",
    "op_flops",
    "op_name",
    "signature_of",
    "trace",
    "with_optimizer",
]

_aten = torch.ops.aten

#: Write running statistics that their own output does not depend on in training; some hide it from the schema.
BATCH_NORMS = frozenset(
    f"aten.{name}"
    for name in (
        "native_batch_norm.default",
        "_native_batch_norm_legit.default",
        "_batch_norm_with_update.default",
        "cudnn_batch_norm.default",
        "miopen_batch_norm.default",
    )
)


#: Look only at the shape, strides and dtype of their first argument, so they run again without its data.
METADATA_ONLY = frozenset(
    op
    for packet in (
        _aten.empty_like, _aten.zeros_like, _aten.ones_like, _aten.full_like, _aten.rand_like, _aten.randn_like,
        _aten.new_empty, _aten.new_zeros, _aten.new_ones, _aten.new_full, _aten.new_empty_strided,
    )
    for op in (getattr(packet, overload) for overload in packet.overloads())
    if not op._schema.is_mutable
)  # fmt: skip


# ------------------------------------------------------------------------- what the dispatcher tells us


def op_name(func: Any) -> str:
    """`aten.mm.default` and the like: stable across processes and releases of the same op."""
    name = _NAMES.get(func)
    if name is None:
        name = _NAMES[func] = str(func)
    return name


_NAMES: dict[Any, str] = {}


def is_random(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Does this call draw from a torch generator? Attention kernels only do so when they drop something."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            value = kwargs.get("dropout_p", args[position] if position < len(args) else argument.default_value)
            return bool(value)
    return True


def is_uncounted(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Ops that may happen in the forward and not in its replay, or the other way round, without any meaning.

    `detach` and every other view: they make no bytes, and autograd calls some on its own (after an in-place op on a
    view of a tensor subclass it makes the view again). And autocast's cast of a weight: cached for the rest of the
    autocast context, so the second use of a weight does not cast it again. What autocast caches is what counts, since
    inside its own cast it is switched off and cannot be asked.
    """
    if func.is_view or func.namespace in ("profiler", "prim"):  # marks of a span; a fake tensor asked for its device
        return True
    if func is _aten._to_copy.default:
        source, dtype = args[0], kwargs.get("dtype")
        return bool(
            source.is_leaf and source.requires_grad and dtype not in (None, source.dtype) and not source._is_view()
        )
    return False


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Scores, and their product with the values. Grouped keys and values serve all heads of the query."""
    batch, heads, queries, width = query.shape
    return 2 * int(batch * heads * queries * key.shape[2]) * int(width + value.shape[3])


def _attention_backward_flops(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """The scores again, their gradient, and those of values, queries and keys (Dao et al., arXiv:2205.14135)."""
    batch, heads, queries, width = query.shape
    return 2 * int(batch * heads * queries * key.shape[2]) * int(3 * width + 2 * value.shape[3])


# torch's own counter misses the CPU kernel (4.3 % of a GPT-2 step), and that of torch 2.11 refuses grouped queries
_OWN_FLOPS = {
    packet: formula
    for kind in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
    for packet, formula in (
        (getattr(_aten, f"_scaled_dot_product_{kind}"), _attention_flops),
        (getattr(_aten, f"_scaled_dot_product_{kind}_backward"), _attention_backward_flops),
    )
}
#: Ops of libraries that may not be there, by namespace and name.
_OTHERS_FLOPS: dict[str, dict[str, Callable[..., int]]] = {
    "bitsandbytes": {"gemm_4bit": lambda a, _, shape, *__, **___: 2 * int(a.numel()) * int(shape[0])}
}


@functools.cache
def _out_of_place(packet: Any) -> Any:
    """`aten.addmm` of `aten.addmm_`, for which torch has no formula of its own."""
    name = packet.__name__
    return getattr(_aten, name[:-1], None) if name.endswith("_") and not name.startswith("_") else None


def op_flops(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    """FLOPs of one call by torch's own formulas (matrix products, convolutions, attention); 0 for the rest."""
    packet = func._overloadpacket
    own: Any = _OWN_FLOPS.get(packet) or _OTHERS_FLOPS.get(func.namespace, {}).get(packet.__name__)
    if own:
        return int(own(*args, **kwargs))
    formula: Any = flop_registry.get(packet) or flop_registry.get(_out_of_place(packet))
    if not formula:
        return 0
    # `addmm.dtype` takes the dtype of its result besides, and `out=` says where that goes
    shapes = [argument for argument in args if not isinstance(argument, torch.dtype)]
    named = {name: value for name, value in kwargs.items() if name not in ("out", "out_dtype")}
    return int(formula(*shapes, **named, out_val=out))


def costs_flops(name: str) -> bool:
    """Does torch, or we, have a formula for the FLOPs of the op of this name? All ops of other libraries count too."""
    namespace, _, rest = name.partition(".")
    packet = f"{namespace}.{rest.partition('.')[0]}"
    return namespace not in ("aten", "prims") or packet in _COSTLY


_COSTLY = frozenset(str(packet) for packet in (*flop_registry, *_OWN_FLOPS))


def signature_of(module: nn.Module) -> str:
    """Class, parameters (name, shape, dtype, trainable or not) of a unit, shortened; equal for equal units."""
    parts = [
        f"{name}:{tuple(p.shape)}:{p.dtype}:{p.requires_grad}"
        for name, p in module.named_parameters(remove_duplicate=False)
    ]
    digest = hashlib.sha256("|".join(parts).encode()).hexdigest()[:12]
    return f"{type(module).__qualname__}({len(parts)} parameters, {digest})"


# ------------------------------------------------------------------------------------------ the recorder


@dataclass
class _Storage:
    """A storage while it is being recorded."""

    id: int
    size_bytes: int
    dtype: str
    shape: tuple[int, ...]
    producer: int | None
    frame: int | None
    ordinal: int | None
    version: int = 0  # counts the ops that wrote it
    collective: bool = False  # made for what other processes send, or are sent
    emptied: bool = False  # given back while it still was a value


@dataclass
class _Call:
    """An op while it is being recorded."""

    id: int
    name: str
    reads: list[tuple[int, int]]  # value id, version read
    writes: list[int]
    outputs: list[int | None]
    fresh: list[int]
    kind: Kind
    phase: Phase
    frame: int | None
    ordinal: int | None
    unit: str | None
    flops: int
    out_bytes: int
    seconds: list[float] = field(default_factory=list)
    scratch_bytes: int = 0
    rerunnable: bool = True
    adds_to_view: bool = False  # its first argument is a view, whose base keeps autograd from summing into it


#: The name of filling a storage that had been emptied, which is no op of the dispatcher.
_FILLED = "storage.resize_"


@dataclass
class _FrameRecord:
    id: int
    unit: str
    inputs: tuple[int, ...]
    calls: list[int] = field(default_factory=list)
    values: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)  # saved ids in order
    exit_versions: dict[int, int] = field(default_factory=dict)
    effects: set[int] = field(default_factory=set)  # outside values that the frame writes
    pinned: str = ""


class _Holder:
    """What autograd holds instead of the tensor; its end is autograd letting go."""

    __slots__ = ("__weakref__", "recorder", "saved", "tensor")

    def __init__(self, tensor: torch.Tensor | None, saved: int, recorder: _Recorder) -> None:
        self.tensor, self.saved, self.recorder = tensor, saved, recorder

    def __del__(self) -> None:
        self.recorder.released(self.saved)


class _Recorder(TorchDispatchMode):
    """Records one pass. `dry` throws saved tensors away."""

    def __init__(self, *, dry: bool, fake: FakeStep | None = None) -> None:
        super().__init__()
        self.dry, self.fake = dry, fake
        self.granule_bytes = 1 if fake is None else fake.granule_bytes
        self.marks = False  # name each op to the profiler
        self.recording = True
        self.phase = Phase.FORWARD
        self.storages: list[_Storage] = []
        self.live: dict[int, int] = {}  # storage address -> value id
        self.contents: dict[int, int] = {}  # of storages that are filled and emptied: address -> id of what is in it
        self.watches: dict[int, Any] = {}
        self.calls: list[_Call] = []
        self.events: list[tuple[Happening, int]] = []
        self.frames: list[_FrameRecord] = []
        self.open: _FrameRecord | None = None
        self.depth = 0
        self.saved: list[tuple[int, int | None, int | None]] = []  # value, frame, ordinal
        self.read: set[int] = set()
        self.reading_unit: str | None = None
        self.restart: Restart | None = None  # wants to know what the ops are about to write
        self.in_cross_entropy = False
        self.census: Census | None = None
        self.custom: dict[str, int] = {}  # calls of custom autograd functions, by name
        self.log_softmaxes: list[
            tuple[int, int]
        ] = []  # calls that a plain cross entropy made, bytes of a chunk of rows

    # -- storages

    def value_of(self, tensor: torch.Tensor, producer: int | None = None) -> tuple[int | None, bool]:
        """Value id of the tensor's storage, and whether it is new. (None, False) when it has no storage."""
        if tensor.layout is not torch.strided:
            return None, False
        tensor = local_of(tensor)
        try:
            storage = tensor.untyped_storage()
        except NotImplementedError:
            return None, False
        address = storage._cdata
        known = self.live.get(address)
        if known is not None:
            return known, False
        frame = self.open if producer is not None else None
        record = _Storage(
            id=len(self.storages),
            size_bytes=self._rounded(storage.nbytes()),
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            producer=producer,
            frame=None if frame is None else frame.id,
            ordinal=None if frame is None else len(frame.values),
        )
        if frame is not None:
            frame.values.append(record.id)
        if self.census is not None and producer is not None:
            self.census.made(record.id)
        self._watch(record, storage)
        return record.id, True

    def _rounded(self, size_bytes: int) -> int:
        return -(-size_bytes // self.granule_bytes) * self.granule_bytes

    def _watch(self, record: _Storage, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        self.storages.append(record)
        self.live[address] = record.id
        self.watches[record.id] = weakref.ref(storage, functools.partial(self.died, record.id, address))

    def resized(self, storage: torch.UntypedStorage, before_bytes: int) -> None:
        """A storage was filled or emptied that is the same value all along, as a weight is that FSDP2 gathers.

        What it holds for a while is a value of its own, which nothing reads.
        """
        if not self.recording:
            return
        address, size_bytes = storage._cdata, storage.nbytes()
        if address not in self.live:  # not seen full yet: what it is weighs nothing, only what is in it does
            self._watch(_Storage(len(self.storages), 0, "uint8", (before_bytes,), None, None, None), storage)
        held = self.contents.pop(address, None)
        if held is not None:
            self.events.append((Happening.FREE, held))
        elif before_bytes:
            known = self.storages[self.live[address]]
            if known.producer is not None:  # made in this pass, and now emptied
                self.events.append((Happening.FREE, known.id))
                known.emptied = True
        if size_bytes:
            if self.restart is not None:
                self.restart.filled(storage)
            content = _Storage(len(self.storages), self._rounded(size_bytes), "uint8", (size_bytes,), None, None, None)
            content.producer = len(self.calls)
            content.collective = True
            self.storages.append(content)
            self.contents[address] = content.id
            call = _Call(
                id=len(self.calls), name=_FILLED, reads=[], writes=[], outputs=[content.id], fresh=[content.id],
                kind=Kind.OPAQUE, phase=self.phase, frame=None, ordinal=None, unit=None, flops=0,
                out_bytes=content.size_bytes, seconds=[0.0],
            )  # fmt: skip
            self.calls.append(call)
            self.events += [(Happening.ALLOC, content.id), (Happening.OP, call.id)]

    def died(self, value: int, address: int, _: object = None) -> None:
        if self.live.get(address) == value:
            del self.live[address]
        self.watches.pop(value, None)
        if not self.recording:
            return
        content = self.contents.pop(address, None)
        if content is not None:
            self.events.append((Happening.FREE, content))
        if self.storages[value].producer is not None and not self.storages[value].emptied:
            self.events.append((Happening.FREE, value))

    def released(self, saved: int) -> None:
        if self.recording and not self.dry:
            self.events.append((Happening.RELEASE, saved))

    # -- ops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten.detach.default:
            out = func(*args, **kwargs)
            if self.fake is not None:
                self.fake.learn(func, args, kwargs, out)
            return out
        if func in _QUERIES or func.namespace == "profiler":
            return func(*args, **kwargs)
        uncounted = is_uncounted(func, args, kwargs)
        frame = None if uncounted else self.open
        schema = func._schema
        reads: list[tuple[int, int]] = []
        for tensor in tensors_in((args, kwargs)):
            value, _ = self.value_of(tensor)
            if value is not None and func not in METADATA_ONLY:
                reads.append((value, self.storages[value].version))
        if self.restart is not None:
            self.restart.before(func, args, kwargs)
        started = time.perf_counter()
        out = self._result(func, args, kwargs)
        seconds = time.perf_counter() - started
        if self.restart is not None:
            self.restart.after(args, kwargs, out)
        name = op_name(func)
        call = _Call(
            id=len(self.calls), name=name, reads=reads, writes=[], outputs=[], fresh=[], kind=Kind.PURE,
            phase=self.phase, frame=None if frame is None else frame.id,
            ordinal=None if frame is None else len(frame.calls),
            unit=self.open.unit
            if self.open is not None
            else self.reading_unit
            if self.phase is Phase.BACKWARD
            else None,
            flops=op_flops(func, args, kwargs, out), out_bytes=0, seconds=[seconds],
        )  # fmt: skip
        if self.fake is not None and not self.dry:
            self.fake.note(call.id, func, args, kwargs, call.flops)
        if func is _aten.add.Tensor and self.phase is Phase.BACKWARD:
            call.adds_to_view = args[0]._is_view()
        outside, self.open = self.open, frame  # an uncounted op's output belongs to no frame
        flat = tensors_in(out) if not isinstance(out, torch.Tensor) else [out]
        for tensor in flat:
            value, fresh = self.value_of(tensor, producer=call.id)
            call.outputs.append(value)
            if fresh and value is not None:
                call.fresh.append(value)
                call.out_bytes += self.storages[value].size_bytes
        self.open = outside
        if not flat:
            call.outputs.append(None)
        if schema.is_mutable:
            for position, argument in enumerate(schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    target = kwargs.get(argument.name, args[position] if position < len(args) else None)
                    for tensor in tensors_in(target):
                        written, _ = self.value_of(tensor)
                        if written is not None:
                            call.writes.append(written)
                            self.storages[written].version += 1
        if self.in_cross_entropy and func is _aten._log_softmax.default:
            rows, classes = out.shape
            row_bytes = classes * out.element_size()
            self.log_softmaxes.append((call.id, rows_at_once(rows, row_bytes) * row_bytes))
        self._classify(call, func, args, kwargs, frame)
        self.calls.append(call)
        for value in call.fresh:
            self.events.append((Happening.ALLOC, value))
        self.events.append((Happening.OP, call.id))
        if frame is not None:
            frame.calls.append(call.id)
        return out

    def _result(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self.fake is None and not self.marks:
            return func(*args, **kwargs)
        with torch.profiler.record_function(MARK) if self.marks else contextlib.nullcontext():
            return func(*args, **kwargs) if self.fake is None else self.fake.run(func, args, kwargs)

    @property
    def dispatched(self) -> list[_Call]:
        """The calls that went through the dispatcher, as a profile numbers them."""
        return [call for call in self.calls if call.name != _FILLED]

    def scratch_from(self, profiler: Any) -> None:
        """Each op's scratch bytes, and the sums that the engine would make in place, from a profile of this pass."""
        calls = self.dispatched
        risen = risen_bytes(profiler, len(calls))
        _sum_in_place(self, _summed_by_engine(profiler, len(calls)))
        for call, rise in zip(calls, risen, strict=True):
            call.scratch_bytes = max(0, rise - call.out_bytes)

    def _classify(self, call: _Call, func: Any, args: Any, kwargs: Any, frame: _FrameRecord | None) -> None:
        random = is_random(func, args, kwargs)
        batch_norm = call.name in BATCH_NORMS
        if frame is not None:
            for value in call.writes:
                if self.storages[value].frame != frame.id and not batch_norm:
                    frame.effects.add(value)
                    call.rerunnable = False
        if frame is not None and func.namespace == "c10d":
            frame.pinned = (
                "other processes take part in it, as where FSDP2 shards modules inside it on their own: shard whole "
                "blocks, or name those modules as units"
            )
        if frame is not None and torch.Tag.inplace_view in func.tags:
            frame.pinned = f"{call.name} changes a tensor's shape in place"
        if call.writes and not batch_norm:
            call.kind = Kind.RANDOM if random else Kind.INPLACE
        elif random:
            call.kind = Kind.RANDOM
        elif call.outputs and not call.fresh and all(v is not None for v in call.outputs):
            call.kind = Kind.VIEW
        elif any(v is not None and v not in call.fresh for v in call.outputs) and not batch_norm:
            call.kind = Kind.OPAQUE
            call.rerunnable = False

    # -- saved tensors

    def pack(self, tensor: torch.Tensor) -> _Holder:
        return _Holder(None if self.dry else tensor, self.note_saved(tensor), self)

    def note_saved(self, tensor: torch.Tensor) -> int:
        value, _ = self.value_of(tensor)
        if value is None and tensor.layout is torch.sparse_coo:  # a buffer is known by its values
            with _disable_current_modes():
                value = self.live.get(tensor._values().untyped_storage()._cdata)
        if value is None:
            raise Unsupported(f"autograd saves a {tensor.layout} tensor, which has no storage to plan for")
        if self.census is not None:
            self.census.saved(value)
        saved = len(self.saved)
        frame = self.open
        self.saved.append((value, None if frame is None else frame.id, None if frame is None else len(frame.slots)))
        if frame is not None:
            frame.slots.append(saved)
        return saved

    def unpack(self, holder: _Holder) -> torch.Tensor:
        if holder.tensor is None:
            raise Unsupported(
                "the model runs a backward of its own inside its forward (torch.autograd.grad, as physics losses do), "
                "which cannot be traced"
            )
        if holder.saved not in self.read:
            self.read.add(holder.saved)
            self.events.append((Happening.LOAD, holder.saved))
            frame = self.saved[holder.saved][1]
            if frame is not None:
                self.reading_unit = self.frames[frame].unit
        return holder.tensor

    # -- frames

    def frame_forward(self, path: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.open is not None or not torch.is_grad_enabled() or not self.recording:
                return original(*args, **kwargs)
            inputs = dict.fromkeys(v for v, _ in map(self.value_of, tensors_in((args, kwargs))) if v is not None)
            frame = _FrameRecord(id=len(self.frames), unit=path, inputs=tuple(inputs))
            self.frames.append(frame)
            self.events.append((Happening.ENTER, frame.id))
            self.open = frame
            if any(_is_cache(item) for item in (*args, *kwargs.values())):
                frame.pinned = "it is given a key-value cache, which a second run would append to again"
            drawn = _foreign_random_state()
            try:
                return original(*args, **kwargs)
            finally:
                self.open = None
                if _foreign_random_state() != drawn:
                    frame.pinned = "it draws random numbers from Python or NumPy, whose state is not restored"
                frame.exit_versions = {v: self.storages[v].version for v in (*frame.values, *frame.inputs)}
                self.events.append((Happening.EXIT, frame.id))

        return forward


def _is_cache(item: Any) -> bool:
    """A key-value cache of transformers, by what it can do: the models that make their own pass it along."""
    return callable(getattr(item, "get_seq_length", None)) and callable(getattr(item, "update", None))


def _foreign_random_state() -> tuple[int, int]:
    """A cheap mark of Python's and NumPy's generators: equal marks mean that nothing was drawn."""
    import random

    mark = hash(random.getstate())
    try:
        import numpy
    except ImportError:
        return mark, 0
    state: Any = numpy.random.get_state()
    return mark, hash((state[1].tobytes(), state[2]))


class _Timer(TorchDispatchMode):
    """A pass that only measures: seconds per op and, between `marks`, the allocator's own view of each op."""

    def __init__(self, cuda: bool) -> None:
        super().__init__()
        self.names: list[str] = []
        self.seconds: list[float] = []
        self.cuda = cuda
        self.risen_bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _aten.detach.default or func.namespace == "profiler":
            return func(*args, **(kwargs or {}))
        self.names.append(op_name(func))
        if self.cuda:
            with torch.profiler.record_function(MARK):
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                started = time.perf_counter()
                out = func(*args, **(kwargs or {}))
                torch.cuda.synchronize()
                self.seconds.append(time.perf_counter() - started)
                self.risen_bytes.append(torch.cuda.max_memory_allocated() - before)
                return out
        with torch.profiler.record_function(MARK):
            started = time.perf_counter()
            out = func(*args, **(kwargs or {}))
            self.seconds.append(time.perf_counter() - started)
        return out


MARK = "tightfit::op"

#: Ask a fake tensor about itself; a real step has no such ops.
_QUERIES = frozenset({torch.ops.prim.device.default})

#: Wrappers whose steps a dispatch mode cannot see, or whose peaks are not those of one device.
_NOT_OURS = {
    "DataParallel": "it copies the model to several devices; fit the module inside it, on one",
}


# -------------------------------------------------------------------------------------------- the verb


def trace(
    model: nn.Module,
    batch: Any,
    loss: LossFunction | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    units: UnitsAsked = None,
    fake: bool = False,
    device: Device | torch.device | str | None = None,
    tiles: bool = True,
) -> Trace:
    """One step of `model` on `batch`, recorded.

    `loss(model, batch)` gives the scalar; by default the output's `.loss`, or the output itself. With an
    `optimizer` its state and its step are part of the trace. Gradients that exist when `trace` is called
    are taken to exist at every step (accumulation). `units` as in `step.find_units`; by default other modules are taken
    where they hold more of what autograd saves (`tightfit.units`).

    `fake=True` runs the step on fake tensors (`tightfit.fake`): the model may live on `meta`, nothing is allocated and
    seconds are estimated. Then `device` is the target: a `Device` of the catalog, or `"cuda"` for CUDA's kernels in
    general. Otherwise `device` only moves `batch`.

    `tiles`: where the loss, or the largest unit, is a large part of what cannot be recomputed, record the step again
    with tiles in force, for plans that need them; a recording takes as long as a step, so up to twice the time.

    Checkpointing of the model's own (`gradient_checkpointing_enable`) is off meanwhile, as it is under a plan.

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
    if any(getattr(module.forward, "__tightfit__", False) for module in model.modules()):
        raise InvalidInput("a plan is in force on this model, so its own step cannot be seen; remove the plan first")
    for path, module in model.named_modules():
        if type(module).__name__ in _NOT_OURS:
            raise Unsupported(f"{path or 'the model'} is a {type(module).__name__}: {_NOT_OURS[type(module).__name__]}")
    if not torch.is_grad_enabled():
        raise InvalidInput("gradients are switched off here (torch.no_grad): there is no training step to trace")
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    if fake:
        step = FakeStep(target)
        with (
            own_checkpointing_off(model),
            refusals_named(f"the {type(model).__name__}"),
            unsynchronised(model),
            uncompiled(model),
            faked(model, batch, step) as fake_batch,
            no_key_value_cache(model),
        ):
            return _trace(model, fake_batch, loss, optimizer, modules, step.restart, step, tiles, units is None)
    with (
        own_checkpointing_off(model),
        unsynchronised(model),
        uncompiled(model),
        undisturbed(model, batch) as restart,
        no_key_value_cache(model),
    ):
        return _trace(model, batch, loss, optimizer, modules, restart, None, tiles, units is None)


def custom_functions(result: torch.Tensor) -> dict[str, int]:
    """The `torch.autograd.Function`s in the history of `result` that are not torch's own: their calls by name."""
    found: dict[str, int] = {}
    seen: set[Any] = set()
    pending: list[Any] = [result.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            function = node._forward_cls  # type: ignore[attr-defined]
            if not function.__module__.startswith(("torch.", "tightfit.")):
                found[function.__name__] = found.get(function.__name__, 0) + 1
        pending += [following for following, _ in node.next_functions]
    return found


def _custom_note(functions: Mapping[str, int]) -> tuple[str, ...]:
    if not functions:
        return ()
    named = ", ".join(f"{name} ({n} {'call' if n == 1 else 'calls'})" for name, n in sorted(functions.items()))
    return (f"custom autograd functions, whose ops are recorded and rerun one by one: {named}",)


def _target(device: Device | torch.device | str | None) -> Device | None:
    if device is None or isinstance(device, Device):
        return device
    kind = torch.device(device).type
    if kind == "cpu":
        return None
    if kind != "cuda":
        raise InvalidInput(f"no kernels of {device!r} are known: use cpu, cuda or a GPU of the catalog")
    return NOMINAL_CUDA


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
) -> Trace:
    """`by_bytes`: the first pass may show better units than `modules`."""
    if strategy_of(model) is Strategy.FSDP2:
        # its first forward makes what the later ones fill again; and tiles would compute where no weights are
        restart()
        _record(model, batch, loss, modules, restart, dry=True, fake=fake)
        tiles = by_bytes = False
    # a wrapper of the compiler warns of hooks on every module
    census = Census(inside(model)) if by_bytes and not compiled_entries(model) else None
    with census or contextlib.nullcontext():
        dry, sought, token_wise = _first_pass(model, batch, loss, modules, restart, fake, census)
    if census is not None:
        better = census.divided(modules, {storage.id: storage.size_bytes for storage in dry.storages})
        if better.keys() != modules.keys():
            modules = better
            dry, sought, token_wise = _first_pass(model, batch, loss, modules, restart, fake)
    if not dry.frames:
        modules = {"": model}
        sought, token_wise = Sought(), []
        restart()
        dry = _record(model, batch, loss, modules, restart, dry=True, fake=fake)
    target = fake.target if fake is not None else None
    tail = None if optimizer is None else record_optimizer(optimizer, target)
    step = _Step(model, batch, loss, modules, restart, fake, tail)
    try:
        recorded = step.recorded(dry, None)
    except _Unlike:  # a model's first forward may do more than its later ones: what it sets up stays
        recorded = step.recorded(step.dry(), None)
    if not tiles:
        return recorded
    tiled, reasons = _tiled(step, recorded, sought, token_wise)
    return dataclasses.replace(recorded, tiled=tiled, notes=(*recorded.notes, *reasons))


def _first_pass(
    model: nn.Module,
    batch: Any,
    loss: LossFunction | None,
    modules: Mapping[str, nn.Module],
    restart: Callable[[], None],
    fake: FakeStep | None,
    census: Census | None = None,
) -> tuple[_Recorder, Sought, list[TiledModule]]:
    """The dry pass with `modules` for units, and what of it could be tiled."""
    restart()
    paths = list(modules)
    with head_sought(model, paths) as sought, modules_sought(model, paths, fake is not None) as token_wise:
        dry = _record(model, batch, loss, modules, restart, dry=True, fake=fake, census=census)
    return dry, sought, token_wise


@dataclass(frozen=True)
class _Step:
    """What is recorded, once as it is and once more for each way to tile it."""

    model: nn.Module
    batch: Any
    loss: LossFunction | None
    modules: Mapping[str, nn.Module]
    restart: Callable[[], None]
    fake: FakeStep | None
    tail: OptimizerRecord | None

    def dry(self) -> _Recorder:
        self.restart()
        return _record(self.model, self.batch, self.loss, self.modules, self.restart, dry=True, fake=self.fake)

    def tiled(self, tiling: Tiling) -> tuple[Trace | None, str]:
        """The trace with `tiling` in force; None where the logits are made whole all the same, and by whom."""
        stats = TileStats()
        with in_force(self.model, tiling, stats, list(self.modules)):
            dry = self.dry()
            if tiling.head is not None and (stats.whole or not stats.losses):
                return None, stats.asked_by or "what is no cross entropy of class indices"
            return self.recorded(dry, tiling), ""

    def recorded(self, dry: _Recorder, tiling: Tiling | None) -> Trace:
        """The trace of the step as it runs now, after its dry pass."""
        model, fake = self.model, self.fake
        self.restart()
        static = static_bytes_by_category(model, self.batch, granule_bytes=1 if fake is None else fake.granule_bytes)
        if fake is not None:
            fake.forget_calls()
        # one pass fewer where the clock need not wait for a device: the same ops are timed elsewhere too
        at_once = fake is None and tiling is not None and device_of(model).type == "cpu"
        full = _record(
            model, self.batch, self.loss, self.modules, self.restart, dry=False, fake=fake, measured=at_once
        )  # fmt: skip
        gradients = {
            v for p in model.parameters() if p.grad is not None for v in [full.value_of(p.grad)[0]] if v is not None
        }
        full.recording = False
        if gradients_are_views(model):
            _into_buckets(full, gradients)
        _same_ops("the dry pass", [c.name for c in dry.calls], [c.name for c in full.calls if c.phase is Phase.FORWARD])
        for call, other in zip(full.calls, dry.calls, strict=False):
            call.seconds += other.seconds
        notes = _custom_note(full.custom)
        if fake is not None:
            for number, size_bytes in fake.scratch_bytes().items():
                full.calls[number].scratch_bytes = size_bytes
            static[Category.WORKSPACE.value] = fake.workspace_bytes
            notes += fake.notes
        elif not at_once:
            self.restart()
            _measure(model, self.batch, self.loss, full)
        trace = _Assembly(model, self.batch, dry, full, self.modules, static, gradients, fake, notes).trace()
        if fake is not None:
            trace = retimed(trace, fake.target or NOMINAL_CPU)
        trace = dataclasses.replace(trace, tiling=tiling)
        return trace if self.tail is None else behind(trace, self.tail)


#: A loss that is less than this part of the peak is not worth tiles.
_WORTH_TILES = 0.10


def _tiled(
    step: _Step, recorded: Trace, sought: Sought, token_wise: Sequence[TiledModule]
) -> tuple[tuple[Trace, ...], tuple[str, ...]]:
    """The step recorded again with tiles in force, where these can matter; and why not, where they cannot."""
    line = simulate_choices(recorded, ())
    loss_bytes = max(line.by_category[Category.LOSS.value], default=0)
    # about what is left when every unit is recomputed
    floor_bytes = line.peak_bytes - max(line.by_category[Category.SAVED.value], default=0)
    found: list[Trace] = []
    reasons: tuple[str, ...] = ()
    head = Tiling()
    if loss_bytes >= _WORTH_TILES * max(1, floor_bytes):
        if sought.path is not None:
            tiling = Tiling(head=sought.path, rows=rows_of_tile(sought.rows, sought.row_bytes))
            variant, asked_by = step.tiled(tiling)
            if variant is None:
                reasons = (f"the head and the loss cannot be tiled: the logits are asked for whole, by {asked_by}",)
            else:
                head = tiling
                found.append(variant)
        elif sought.reason:
            reasons = (f"the head and the loss cannot be tiled: {sought.reason}",)
    if token_wise and _unit_owns_peak(found[-1] if found else recorded):
        variant, _ = step.tiled(dataclasses.replace(head, modules=tuple(token_wise)))
        if variant is not None:
            found.append(variant)
    return tuple(found), reasons


def _unit_owns_peak(recorded: Trace) -> bool:
    """With every unit recomputed, is it one of them that needs the most?"""
    effort = Effort(points=4, solver_seconds=0.2, proves=False)
    blocks = dataclasses.replace(recorded, tiled=())
    line = simulate_choices(blocks, every_block(blocks, effort=effort).choices)
    paths = {unit.path for unit in recorded.units if not unit.pinned}
    return any(f" of {path}:" in line.peak_owner for path in paths)


def _record(
    model: nn.Module,
    batch: Any,
    loss: LossFunction | None,
    modules: Mapping[str, nn.Module],
    restart: Callable[[], None],
    *,
    dry: bool,
    fake: FakeStep | None,
    measured: bool = False,
    census: Census | None = None,
) -> _Recorder:
    """`measured`: have the pass also tell each op's scratch bytes (on the CPU). `census`: have it told of values."""
    recorder = _Recorder(dry=dry, fake=fake)
    recorder.census = census
    recorder.restart = restart if isinstance(restart, Restart) else None
    for tensor in [*model.parameters(), *model.buffers(), *tensors_in(batch)]:
        recorder.value_of(tensor._values() if tensor.layout is torch.sparse_coo else tensor)
    for parameter in model.parameters():
        if parameter.grad is not None:
            recorder.value_of(parameter.grad)
    patches = [
        ForwardPatch(module, functools.partial(recorder.frame_forward, path)) for path, module in modules.items()
    ]

    def note_cross_entropy(entered: bool) -> None:
        recorder.in_cross_entropy = entered

    profiler: Any = None
    if measured:
        recorder.marks = True
        profiler = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
        )
    try:
        with profiler or contextlib.nullcontext(), resizes_told(recorder.resized), recorder:
            with (
                torch.autograd.graph.saved_tensors_hooks(recorder.pack, recorder.unpack),
                watched(note_cross_entropy),
            ):
                result = compute_loss(model, batch, loss)
            if dry:
                recorder.recording = False
            else:
                recorder.custom = custom_functions(result)
                recorder.phase = Phase.BACKWARD
                if fake is None:
                    result.backward()
                else:
                    _backward_marked(result, recorder)
                del result
        if measured:
            recorder.recording = False
            recorder.scratch_from(profiler)
    except RuntimeError as error:
        if "saved tensor hooks" in str(error):
            raise Unsupported(
                "the model calls torch.func.grad or another of its transforms, under which torch cannot tell what "
                "autograd saves, so the step cannot be traced"
            ) from error
        raise
    finally:
        for patch in patches:
            patch.undo()
    return recorder


def _backward_marked(result: torch.Tensor, recorder: _Recorder) -> None:
    """Fake tensors are never summed in place; see from the profile which sums the engine would have made so."""
    first = len(recorder.dispatched)
    recorder.marks = True
    with cpu_profile(memory=False) as profiler:
        result.backward()
    recorder.marks = False
    count = len(recorder.dispatched) - first
    _sum_in_place(recorder, [False] * first + _summed_by_engine(profiler, count))


def _measure(model: nn.Module, batch: Any, loss: LossFunction | None, full: _Recorder) -> None:
    """Seconds once more, and each op's scratch bytes by the allocator's own count."""
    cuda = device_of(model).type == "cuda"
    timer = _Timer(cuda)
    profiler = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=not cuda, acc_events=True
    )
    with profiler, timer:
        compute_loss(model, batch, loss).backward()
    calls = full.dispatched
    _same_ops("the measured pass", timer.names, [c.name for c in calls])
    risen = timer.risen_bytes if cuda else risen_bytes(profiler, len(calls))
    _sum_in_place(full, _summed_by_engine(profiler, len(calls)))
    for call, seconds, rise in zip(calls, timer.seconds, risen, strict=True):
        call.seconds.append(seconds)
        call.scratch_bytes = max(0, rise - call.out_bytes)


def risen_bytes(profiler: Any, count: int) -> list[int]:
    """Per marked op, how far the CPU allocator's count rose inside it."""
    events = profiler.profiler.kineto_results.events()
    marks = sorted((e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() == MARK)
    memory = memory_events(profiler)
    if len(marks) != count:
        return [0] * count  # the profiler lost events; scratch is then only known as zero
    risen = []
    cursor = 0
    for start, end in marks:
        while cursor < len(memory) and memory[cursor][0] < start:
            cursor += 1
        level = top = 0
        while cursor < len(memory) and memory[cursor][0] <= end:
            level += memory[cursor][1]
            top = max(top, level)
            cursor += 1
        risen.append(top)
    return risen


_ENGINE = "autograd::engine::evaluate_function: "


def _summed_by_engine(profiler: torch.profiler.profile, count: int) -> list[bool]:
    """Per marked op: did autograd's engine call it, between two nodes, to sum gradients that meet?"""
    results: Any = profiler.profiler
    threads: dict[int, list[tuple[int, int, str]]] = defaultdict(list)
    for event in results.kineto_results.events():
        name = event.name()
        if name != "[memory]":
            threads[event.start_thread_id()].append((event.start_ns(), -(event.start_ns() + event.duration_ns()), name))
    marks: list[tuple[int, bool]] = []
    for events in threads.values():
        open_events: list[tuple[int, str]] = []
        for start, minus_end, name in sorted(events):
            while open_events and open_events[-1][0] <= start:
                open_events.pop()
            if name == MARK:
                # the node's own event has the engine event's name without its prefix
                names = [each for _, each in open_events]
                engine = max((i for i, each in enumerate(names) if each.startswith(_ENGINE)), default=None)
                between = engine is not None and names[engine].removeprefix(_ENGINE) not in names[engine + 1 :]
                marks.append((start, between))
            open_events.append((-minus_end, name))
    marks.sort()
    return [between for _, between in marks] if len(marks) == count else [False] * count


def _sum_in_place(full: _Recorder, summed: list[bool]) -> None:
    """Put back what a dispatch mode takes away: the engine sums gradients in place where nobody else holds them.

    Under a mode it never does (`isTensorSubclassLike` in torch/csrc/autograd/input_buffer.cpp). Where the first
    addend dies at the sum, its bytes become the sum's: it is freed before the sum is made, not after. A view (the
    gradient of a linear layer's weight is one) holds its base, so nothing is summed into it.
    """
    position = {subject: i for i, (what, subject) in enumerate(full.events) if what is Happening.OP}
    for call, by_engine in zip(full.dispatched, summed, strict=True):
        if not by_engine or call.name != "aten.add.Tensor" or len(call.fresh) != 1 or not call.reads:
            continue
        if call.adds_to_view:
            continue
        old, new = call.reads[0][0], call.fresh[0]
        at = position[call.id]
        until = next((i for i in range(at + 1, len(full.events)) if full.events[i][0] is Happening.OP), None)
        dies = next(
            (i for i in range(at + 1, until or len(full.events)) if full.events[i] == (Happening.FREE, old)), None
        )
        if dies is None or full.storages[old].size_bytes != full.storages[new].size_bytes:
            continue
        made = full.events.index((Happening.ALLOC, new), max(0, at - 4))
        # neither move changes the position of an op's own event by more than the two entries swap
        del full.events[dies]
        full.events.insert(made, (Happening.FREE, old))
        position[call.id] = at + 1


def _into_buckets(full: _Recorder, gradients: Container[int]) -> None:
    """DDP copies each gradient into its bucket as soon as it is there, and lets go of it."""
    last: dict[int, int] = {}
    for at, (what, subject) in enumerate(full.events):
        if what is Happening.OP:
            call = full.calls[subject]
            last.update((v, at) for v in (*(v for v, _ in call.reads), *call.writes, *call.fresh) if v in gradients)
    for value, at in sorted(last.items(), key=lambda item: -item[1]):
        if full.storages[value].producer is not None:
            full.events.insert(at + 1, (Happening.FREE, value))


def memory_events(profiler: torch.profiler.profile) -> list[tuple[int, int]]:
    """(nanosecond, change in bytes) of every allocation and release that a finished CPU profile saw, in order.

    Releases of what was allocated before the profile began are left out: torch gives them the size that another
    block once had at the same address.
    """
    results: Any = profiler.profiler
    found = []
    open_nodes = list(results.kineto_results.experimental_event_tree())
    while open_nodes:
        node = open_nodes.pop()
        open_nodes += node.children
        if node.tag == torch._C._profiler._EventType.Allocation:
            found.append((node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size))
    found.sort()
    alive: set[int] = set()
    changes = []
    for nanosecond, address, changed_bytes in found:
        if changed_bytes > 0:
            alive.add(address)
        elif address not in alive:
            continue
        else:
            alive.remove(address)
        changes.append((nanosecond, changed_bytes))
    return changes


class _Unlike(Unsupported):
    """Two passes ran other ops."""


def _same_ops(which: str, found: list[str], expected: list[str]) -> None:
    if found == expected:
        return
    at = next(
        (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), min(len(found), len(expected))
    )
    names = [names[at] if at < len(names) else "the end" for names in (found, expected)]
    raise _Unlike(
        f"the step is not the same twice: op {at} of {which} is {names[0]}, in the recorded pass {names[1]}; "
        "a step that changes from run to run on the same batch and random state cannot be planned"
    )


def with_optimizer(trace: Trace, optimizer: torch.optim.Optimizer, target: Device | None = None) -> Trace:
    """`trace` with the optimizer's step behind it and its state among the static bytes."""
    return behind(trace, record_optimizer(optimizer, target))


@dataclass(frozen=True)
class OptimizerRecord:
    """A step of an optimizer: what ran, and the bytes of the state that was there before."""

    tail: _Recorder
    state_bytes: int


def record_optimizer(optimizer: torch.optim.Optimizer, target: Device | None = None) -> OptimizerRecord:
    """One step of `optimizer` on fake copies of its parameters: the first builds the state, the second is recorded.

    `foreach` is decided as torch decides it for the real parameters, or for the target's, since fake ones would
    silently switch it off.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    step = FakeStep(target, guesses=True)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    groups = []
    parameters: list[torch.Tensor] = []
    for group in optimizer.param_groups:
        chosen = dict(group)
        trained = [p for p in group["params"] if p.requires_grad]
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            from torch.optim.optimizer import _default_to_fused_or_foreach

            chosen["foreach"] = (
                step.cuda or _default_to_fused_or_foreach(trained, group.get("differentiable", False), False)[1]
            )
        with mode:
            chosen["params"] = [torch.empty(local_of(p).shape, dtype=p.dtype, requires_grad=True) for p in trained]
        parameters += chosen["params"]
        if trained:
            groups.append(chosen)
    if not groups:
        raise InvalidInput("the optimizer holds no trainable parameter")
    recorder = _Recorder(dry=True, fake=step)
    recorder.phase = Phase.OPTIMIZER
    recorder.recording = False
    try:
        with mode, recorder:
            make: Any = type(optimizer)
            twin = make(groups)
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
            twin.step()
            state_bytes = unique_bytes(
                tensors_in([list(s.values()) for s in twin.state.values()]), recorder.granule_bytes
            )
            recorder.calls, recorder.events = [], []
            recorder.recording = True
            twin.step()
            recorder.recording = False
    except Exception as error:
        raise Unsupported(
            f"the step of {type(optimizer).__name__} cannot be run on fake tensors ({type(error).__name__}: {error}); "
            "trace without an optimizer and leave room for its state"
        ) from error
    return OptimizerRecord(recorder, state_bytes)


def behind(trace: Trace, optimizer: OptimizerRecord) -> Trace:
    """`trace` with the optimizer's ops, values and events behind its own, renumbered."""
    tail = optimizer.tail
    static_bytes = {**trace.static_bytes, Category.OPTIMIZER_STATE.value: optimizer.state_bytes}
    ops, values = len(trace.ops), len(trace.values)
    made = {value for what, value in tail.events if what is Happening.ALLOC}
    all_values = trace.values + tuple(
        Value(
            id=s.id + values, size_bytes=s.size_bytes, dtype=s.dtype, shape=s.shape, unit=None, needed=False,
            producer=s.producer + ops if s.producer is not None and s.id in made else None,
        )
        for s in tail.storages
    )  # fmt: skip
    all_ops = trace.ops + tuple(
        Op(
            id=c.id + ops, unit=None, ordinal=None, name=c.name, inputs=tuple(v + values for v, _ in c.reads),
            outputs=tuple(None if v is None else v + values for v in c.outputs), seconds=0.0, flops=c.flops,
            kind=c.kind, phase=c.phase,
        )
        for c in tail.calls
    )  # fmt: skip
    events = [
        Event(what=what, subject=subject + (ops if what is Happening.OP else values))
        for what, subject in tail.events
        if what is Happening.OP or subject in made
    ]
    return dataclasses.replace(
        trace, ops=all_ops, values=all_values, events=(*trace.events, *events), static_bytes=static_bytes,
        digest=trace_digest(trace.units, all_ops, all_values),
        tiled=tuple(behind(variant, optimizer) for variant in trace.tiled),
    )  # fmt: skip


# ------------------------------------------------------------------------------ from the record to a trace


def _program_of(recorder: _Recorder, frame: _FrameRecord, read: Container[int], held: Sequence[int]) -> Program:
    """What the frame does, in terms of its own values; marks `frame.pinned` where it must not be replayed."""
    ordinal = {value: i for i, value in enumerate(frame.values)}
    steps = []
    for call_id in frame.calls:
        call = recorder.calls[call_id]
        reads: list[int] = []
        early: list[int] = []
        rerunnable = call.rerunnable
        for value, version in call.reads:
            if value in ordinal:
                (reads if version == frame.exit_versions[value] else early).append(ordinal[value])
            elif value in frame.effects:
                rerunnable = False
        steps.append(
            Step(
                name=call.name,
                kind=call.kind,
                reads=tuple(dict.fromkeys(reads)),
                reads_early=tuple(dict.fromkeys(early)),
                outputs=tuple(None if v is None else ordinal.get(v, -1) for v in call.outputs),
                writes=tuple(dict.fromkeys(ordinal[v] for v in (*call.fresh, *call.writes) if v in ordinal)),
                rerunnable=rerunnable,
            )
        )
    if frame.effects & set(frame.inputs):
        frame.pinned = "it changes one of its inputs in place"
    if any(recorder.storages[v].version != frame.exit_versions[v] for v in (*frame.values, *frame.inputs)):
        frame.pinned = frame.pinned or "something that it was given or made is changed in place after it returned"
    return Program(
        steps=tuple(steps),
        slots=tuple(ordinal.get(recorder.saved[s][0], -1) for s in frame.slots),
        wanted=tuple(s in read for s in frame.slots),
        values=len(frame.values),
        held=tuple(held),
    )


class ProgramRecorder:
    """Learns the program of one call of a function while it runs.

    Use as a context manager around the call and pass every tensor that autograd saves to `saw`.
    """

    def __init__(self) -> None:
        self._recorder = _Recorder(dry=True)
        self._frame = _FrameRecord(id=0, unit="region", inputs=())

    def __enter__(self) -> ProgramRecorder:
        self._recorder.frames.append(self._frame)
        self._recorder.open = self._frame
        self._recorder.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._recorder.__exit__(*error)
        self._recorder.open = None
        self._recorder.recording = False
        self._frame.exit_versions = {v: self._recorder.storages[v].version for v in self._frame.values}

    def saw(self, tensor: torch.Tensor) -> None:
        self._recorder.note_saved(tensor)

    def program(self) -> Program:
        """Everything that was saved counts as needed, since nobody has seen the backward yet."""
        return _program_of(self._recorder, self._frame, range(len(self._recorder.saved)), ())


@dataclass
class _Assembly:
    """Turns two recorded passes into the frozen `Trace`."""

    model: nn.Module
    batch: Any
    dry: _Recorder
    full: _Recorder
    modules: Mapping[str, nn.Module]
    static: dict[str, int]
    gradients: set[int]
    fake: FakeStep | None
    notes: tuple[str, ...]
    pinned: dict[str, str] = field(default_factory=dict)

    def trace(self) -> Trace:
        full = self.full
        natural = self._natural_ends()
        outside = {
            (value, full.storages[value].frame)
            for value, frame, _ in full.saved
            if full.storages[value].frame is not None and full.storages[value].frame != frame
        }
        programs = {}
        for frame in full.frames:
            held = [i for i, v in enumerate(frame.values) if v not in natural or (v, frame.id) in outside]
            programs[frame.id] = _program_of(full, frame, full.read, held)
            if frame.pinned:
                self.pinned.setdefault(frame.unit, frame.pinned)
        for path in {frame.unit for frame in full.frames}:
            if len({programs[frame.id].steps for frame in full.frames if frame.unit == path}) > 1:
                self.pinned.setdefault(path, "its calls in one step run different ops, and there is one plan for all")
        self._share_wanted(programs)
        needed = {full.saved[s][0] for s in full.read}
        units = self._units(programs)
        loss = self._loss_values()
        seconds = self._pooled(units)
        ops = tuple(
            Op(
                id=c.id, unit=c.unit, ordinal=c.ordinal, name=c.name, inputs=tuple(v for v, _ in c.reads),
                outputs=tuple(c.outputs), seconds=seconds[c.id], flops=c.flops, kind=c.kind, phase=c.phase,
                frame=c.frame, scratch_bytes=c.scratch_bytes,
            )
            for c in full.calls
        )  # fmt: skip
        values = tuple(
            Value(
                id=s.id, size_bytes=s.size_bytes, dtype=s.dtype, shape=s.shape, producer=s.producer,
                unit=None if s.frame is None else full.frames[s.frame].unit, needed=s.id in needed,
                ordinal=s.ordinal, natural_end=natural.get(s.id),
                category=Category.GRADIENTS if s.id in self.gradients
                else Category.COLLECTIVES if s.collective
                else Category.LOSS if s.id in loss else Category.TEMPORARIES,
            )
            for s in full.storages
        )  # fmt: skip
        return Trace(
            units=units,
            frames=tuple(Frame(id=f.id, unit=f.unit, inputs=f.inputs) for f in full.frames),
            ops=ops,
            values=values,
            saved=tuple(
                Saved(id=i, value=value, frame=frame, ordinal=ordinal, read=i in full.read)
                for i, (value, frame, ordinal) in enumerate(full.saved)
            ),
            events=tuple(Event(what=what, subject=subject) for what, subject in full.events),
            programs=programs,
            static_bytes=self.static,
            device=self._device(),
            environment=environment(),
            digest=trace_digest(units, ops, values),
            batch_sizes=tuple(t.shape[0] for t in tensors_in(self.batch) if t.dim()),
            random_state_bytes=self._random_state_bytes(),
            notes=self.notes,
            losses=tuple(self._losses()),
            out_bytes_per_second=self._target().d2h_bytes_per_second,
            back_bytes_per_second=self._target().h2d_bytes_per_second,
            copies_beside=self._target().kind != "cpu",
            resharded=resharded(self.model),
        )

    def _target(self) -> Device:
        """Whose copies to the host the planner reckons with."""
        if self.fake is not None and self.fake.target is not None:
            return self.fake.target
        return NOMINAL_CUDA if device_of(self.model).type == "cuda" else NOMINAL_CPU

    def _device(self) -> str:
        target = None if self.fake is None else self.fake.target
        return str(device_of(self.model)) if target is None else target.name

    def _random_state_bytes(self) -> int:
        """A saved state of a GPU's generator is a CPU tensor."""
        if self.fake is not None and self.fake.cuda:
            return 0
        with _disable_current_modes():
            return torch.get_rng_state().numel() if device_of(self.model).type == "cpu" else 16

    def _loss_values(self) -> set[int]:
        """What is made after the last unit's forward and before the first unit's backward."""
        full = self.full
        exits = [i for i, (what, _) in enumerate(full.events) if what is Happening.EXIT]
        loads = (
            i for i, (what, s) in enumerate(full.events) if what is Happening.LOAD and full.saved[s][1] is not None
        )
        first, last = max(exits, default=0), next(loads, len(full.events))
        return {s for what, s in full.events[first:last] if what is Happening.ALLOC} if exits else set()

    def _losses(self) -> Iterator[Loss]:
        """Cross entropies outside the units, whose saved log-probabilities only their own backward reads."""
        full = self.full
        readers: dict[int, list[_Call]] = defaultdict(list)
        for call in full.calls:
            for value in dict.fromkeys(v for v, _ in call.reads):
                readers[value].append(call)
        freed = {subject: i for i, (what, subject) in enumerate(full.events) if what is Happening.FREE}
        position = {subject: i for i, (what, subject) in enumerate(full.events) if what is Happening.OP}
        for log_softmax, rows_bytes in full.log_softmaxes:
            call = full.calls[log_softmax]
            if call.frame is not None or len(call.fresh) != 1:
                continue
            saved = call.fresh[0]
            backward = [c for c in readers[saved] if c.phase is Phase.BACKWARD]
            names = [c.name for c in readers[saved]]
            if names != [
                f"aten.{n}.default" for n in ("nll_loss_forward", "nll_loss_backward", "_log_softmax_backward_data")
            ]:
                continue
            likelihood, softmax = backward
            size = full.storages[saved].size_bytes
            alike = all(len(c.fresh) == 1 and full.storages[c.fresh[0]].size_bytes == size for c in backward)
            made = [c.fresh[0] for c in backward] if alike else []
            if not made or any(v not in freed for v in (saved, *made)) or freed[saved] < position[softmax.id]:
                continue
            if [c.id for c in readers[made[0]]] != [softmax.id]:
                continue
            yield Loss(
                log_softmax=log_softmax,
                nll_backward=likelihood.id,
                softmax_backward=softmax.id,
                rows_bytes=rows_bytes,
            )

    def _share_wanted(self, programs: dict[int, Program]) -> None:
        """A plan has one program per unit, so what backward reads in one call of it counts as read in all alike."""
        alike: dict[Any, list[int]] = defaultdict(list)
        for frame in self.full.frames:
            program = programs[frame.id]
            alike[frame.unit, program.slots, tuple(step.name for step in program.steps)].append(frame.id)
        for frames in alike.values():
            if len(frames) > 1:
                wanted = tuple(any(each) for each in zip(*(programs[f].wanted for f in frames), strict=True))
                programs.update({f: dataclasses.replace(programs[f], wanted=wanted) for f in frames})

    def _natural_ends(self) -> dict[int, int]:
        """Event of the full pass after which only autograd holds a value; from its death in the dry pass."""
        op_event = {subject: i for i, (what, subject) in enumerate(self.full.events) if what is Happening.OP}
        ends: dict[int, int] = {}
        last = -1
        for what, subject in self.dry.events:
            if what is Happening.OP:
                last = subject
            elif what is Happening.FREE:
                ends[subject] = op_event[last]
        return ends

    def _units(self, programs: Mapping[int, Program]) -> tuple[Unit, ...]:
        units = []
        for path, module in self.modules.items():
            frames = [f for f in self.full.frames if f.unit == path]
            if not frames:
                continue
            content = json.dumps(
                [[to_json(programs[f.id]), [self.full.storages[v].size_bytes for v in f.values]] for f in frames]
            )
            units.append(
                Unit(
                    path=path,
                    digest=hashlib.sha256(content.encode()).hexdigest()[:16],
                    op_ids=tuple(c for f in frames for c in f.calls),
                    signature=signature_of(module),
                    pinned=self.pinned.get(path, ""),
                )
            )
        return tuple(units)

    def _pooled(self, units: tuple[Unit, ...]) -> dict[int, float]:
        """Median per op, over the passes and over the equal ops of equal units: one noisy second misleads nobody."""
        digest = {unit.path: unit.digest for unit in units}
        samples: dict[tuple[Any, ...], list[float]] = defaultdict(list)
        keys: dict[int, tuple[Any, ...]] = {}
        calls_before: dict[str, int] = {}
        position: dict[int, int] = {}
        for frame in self.full.frames:
            position[frame.id] = calls_before.get(frame.unit, 0)
            calls_before[frame.unit] = position[frame.id] + 1
        for call in self.full.calls:
            if call.frame is None:
                keys[call.id] = ("op", call.id)
            else:
                keys[call.id] = (digest[self.full.frames[call.frame].unit], position[call.frame], call.ordinal)
            samples[keys[call.id]] += call.seconds
        medians = {key: statistics.median(values) for key, values in samples.items() if values}
        return {call: medians.get(key, 0.0) for call, key in keys.items()}


make_verb(__name__, trace)
