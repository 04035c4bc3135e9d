"""The dispatch mode that records a step: its ops, its storages and their lives, what autograd saves and reads.

Invariant: one `Recorder` sees one pass. The mode changes nothing of what runs, with one exception: under a dispatch
mode, a backward adds nothing in place. `without_mode` corrects the record for that.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tightfit.core import (
    EventKind,
    FrozenWeights,
    Kind,
    Phase,
    RowwiseOps,
    Unsupported,
)
from tightfit.levers.loss_in_place.loss import rows_at_once
from tightfit.step.ops import (
    BATCH_NORMS,
    METADATA_ONLY,
    UNWRITTEN,
    changes_nothing,
    is_random,
    is_uncounted,
    op_flops,
    op_name,
)
from tightfit.step.parallel import (
    local_of,
)
from tightfit.step.run import (
    tensors_in,
)
from tightfit.step.saved import without_history
from tightfit.step.snapshot import Snapshot
from tightfit.trace.fake import FakeStep
from tightfit.trace.profiler import MARK
from tightfit.trace.timing import Equal, Sample, Stopwatch
from tightfit.trace.units import Census

_aten = torch.ops.aten


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
class Call:
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
    samples: list[Sample] = field(default_factory=list)
    scratch_bytes: int = 0
    rerunnable: bool = True
    adds_to_view: bool = False  # its first argument is a view, whose base keeps autograd from summing into it
    sums_tied: bool = False  # and is a gradient of a tied weight, which dies here


#: The name of filling a storage that had been emptied, which is no op of the dispatcher.
_FILLED = "storage.resize_"


@dataclass
class FrameRecord:
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
    """What autograd holds instead of a saved tensor. When it dies, autograd has let go of the tensor."""

    __slots__ = ("__weakref__", "recorder", "saved", "tensor")

    def __init__(self, tensor: torch.Tensor | None, saved: int, recorder: Recorder) -> None:
        self.tensor, self.saved, self.recorder = tensor, saved, recorder

    def __del__(self) -> None:
        self.recorder.released(self.saved)


class Recorder(TorchDispatchMode):
    """Records one pass. With `dry` it throws saved tensors away.

    One thing because what is noted of an op rests on the storages that earlier ops have made.
    """

    supports_higher_order_operators = True  # to be refused with a reason

    def __init__(self, *, dry: bool, fake: FakeStep | None = None) -> None:
        super().__init__()
        self.dry, self.fake = dry, fake
        self.granule_bytes = 1 if fake is None else fake.granule_bytes
        self.marks = False  # name each op to the profiler
        self.recording = True
        self.unwritten: dict[int, Call] = {}  # values that were allocated and that no op has written yet
        self.phase = Phase.FORWARD
        self.storages: list[_Storage] = []
        self.live: dict[int, int] = {}  # storage address -> value id
        self.contents: dict[int, int] = {}  # of storages that are filled and emptied: address -> id of what is in it
        self.watches: dict[int, Any] = {}
        self.calls: list[Call] = []
        self.events: list[tuple[EventKind, int]] = []
        self.frames: list[FrameRecord] = []
        self.open: FrameRecord | None = None
        self.depth = 0
        self.saved: list[tuple[int, int | None, int | None]] = []  # value, frame, ordinal
        self.read: set[int] = set()
        self.reading_unit: str | None = None
        self.restart: Snapshot | None = None  # wants to know what the ops are about to write
        self.in_cross_entropy = False
        self.census: Census | None = None
        self.custom: frozenset[str] = frozenset()  # names of custom autograd functions
        self.frozen: Callable[[], Iterable[FrozenWeights]] = tuple  # what is known of frozen weights
        self.log_softmaxes: list[
            tuple[int, int]
        ] = []  # calls that a plain cross entropy made, bytes of a chunk of rows
        self.rowwise: list[RowwiseOps] = []
        self.stopwatch: Stopwatch | None = None  # none: ops are not timed
        self.tied: set[int] = set()  # values that are a gradient of a tied weight, not yet summed

    @contextlib.contextmanager
    def working_by_rows(self, rows: int, rows_at_once: int, tile: torch.Tensor, columns: int) -> Iterator[None]:
        """What runs inside works row by row on `tile`, whose buffer may have `columns`."""
        first, outside = len(self.calls), self.open is None
        yield
        buffer, fresh = self.value_of(tile)
        if outside and len(self.calls) > first and buffer is not None and not fresh:
            self.rowwise.append(
                RowwiseOps(
                    first=first, last=len(self.calls) - 1, rows=rows, rows_at_once=rows_at_once, buffer=buffer,
                    buffer_bytes=self._rounded(self.storages[buffer].shape[0] * columns * tile.element_size()),
                )
            )  # fmt: skip

    # -- storages

    def value_of(self, tensor: torch.Tensor, producer: int | None = None) -> tuple[int | None, bool]:
        """The id of the value that the tensor's storage is, and whether the value is new. (None, False) for a tensor
        without a storage."""
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
        """A storage was filled or emptied, and stays the same value all along. FSDP2 does this with a weight that it
        gathers.

        What the storage holds for a while is a value of its own, which nothing reads.
        """
        if not self.recording:
            return
        address, size_bytes = storage._cdata, storage.nbytes()
        if address not in self.live:  # not seen full yet: what it is weighs nothing, only what is in it does
            self._watch(_Storage(len(self.storages), 0, "uint8", (before_bytes,), None, None, None), storage)
        held = self.contents.pop(address, None)
        if held is not None:
            self.events.append((EventKind.FREE, held))
        elif before_bytes:
            known = self.storages[self.live[address]]
            if known.producer is not None:  # made in this pass, and now emptied
                self.events.append((EventKind.FREE, known.id))
                known.emptied = True
        if size_bytes:
            if self.restart is not None:
                self.restart.filled(storage)
            content = _Storage(len(self.storages), self._rounded(size_bytes), "uint8", (size_bytes,), None, None, None)
            content.producer = len(self.calls)
            content.collective = True
            self.storages.append(content)
            self.contents[address] = content.id
            call = Call(
                id=len(self.calls), name=_FILLED, reads=[], writes=[], outputs=[content.id], fresh=[content.id],
                kind=Kind.OPAQUE, phase=self.phase, frame=None, ordinal=None, unit=None, flops=0,
                out_bytes=content.size_bytes, samples=[],
            )  # fmt: skip
            self.calls.append(call)
            self.events += [(EventKind.ALLOC, content.id), (EventKind.OP, call.id)]

    def died(self, value: int, address: int, _: object = None) -> None:
        if self.live.get(address) == value:
            del self.live[address]
        self.watches.pop(value, None)
        if not self.recording:
            return
        content = self.contents.pop(address, None)
        if content is not None:
            self.events.append((EventKind.FREE, content))
        if self.storages[value].producer is not None and not self.storages[value].emptied:
            self.events.append((EventKind.FREE, value))

    def released(self, saved: int) -> None:
        if self.recording and not self.dry:
            self.events.append((EventKind.RELEASE, saved))

    def ready(self, parameter: torch.Tensor) -> None:
        """The gradient of `parameter` is there, and whole."""
        if self.recording and parameter.grad is not None:
            value, _ = self.value_of(parameter.grad)
            if value is not None:
                self.events.append((EventKind.READY, value))

    def note_tied(self, gradient: torch.Tensor) -> None:
        """Autograd is about to keep `gradient` of a tied weight until the others are there."""
        value, _ = self.value_of(gradient)
        if value is not None:
            self.tied.add(value)

    # -- ops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            raise Unsupported(
                f"the model calls {func}, an operator that runs functions of its own, in which nothing can be seen: "
                "leave it out of eager steps, or mark the parts around it with tightfit.checkpoint"
            )
        if func is _aten.detach.default or changes_nothing(func, args):
            return func(*args, **kwargs) if self.fake is None else self.fake.run(func, args, kwargs)
        if func in _QUERIES or func.namespace == "profiler":
            # half of all calls ask for a device, which a fake tensor knows without another dispatch
            return args[0].fake_device if type(args[0]) is FakeTensor else func(*args, **kwargs)
        uncounted = is_uncounted(func, args, kwargs)
        frame = None if uncounted else self.open
        schema = func._schema
        reads: list[tuple[int, int]] = []
        for tensor in tensors_in((args, kwargs)):
            value, _ = self.value_of(tensor)
            if value is not None and func not in METADATA_ONLY:
                reads.append((value, self.storages[value].version))
                if not func.is_view and not schema.is_mutable:
                    self._read_unwritten(value)
        if self.restart is not None:
            self.restart.before(func, args, kwargs)
        if self.stopwatch is not None:
            self.stopwatch.start()
        out = self._result(func, args, kwargs)
        samples = [] if self.stopwatch is None else [self.stopwatch.stop()]
        if self.restart is not None:
            self.restart.after(args, kwargs, out)
        name = op_name(func)
        call = Call(
            id=len(self.calls), name=name, reads=reads, writes=[], outputs=[], fresh=[], kind=Kind.PURE,
            phase=self.phase, frame=None if frame is None else frame.id,
            ordinal=None if frame is None else len(frame.calls),
            unit=self.open.unit
            if self.open is not None
            else self.reading_unit
            if self.phase is Phase.BACKWARD
            else None,
            flops=op_flops(func, args, kwargs, out), out_bytes=0, samples=samples,
        )  # fmt: skip
        if self.fake is not None and not self.dry:
            self.fake.note(call.id, func, args, kwargs, call.flops)
        if func is _aten.add.Tensor and self.phase is Phase.BACKWARD:
            call.adds_to_view = args[0]._is_view()
            call.sums_tied = call.adds_to_view and bool(reads) and reads[0][0] in self.tied
        outside, self.open = self.open, frame  # an uncounted op's output belongs to no frame
        flat = tensors_in(out) if not isinstance(out, torch.Tensor) else [out]
        for tensor in flat:
            value, fresh = self.value_of(tensor, producer=call.id)
            call.outputs.append(value)
            if fresh and value is not None:
                call.fresh.append(value)
                call.out_bytes += self.storages[value].size_bytes
                if func in UNWRITTEN and frame is not None:
                    self.unwritten[value] = call
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
                            self.unwritten.pop(written, None)
        if self.in_cross_entropy and func is _aten._log_softmax.default:
            rows, classes = out.shape
            row_bytes = classes * out.element_size()
            self.log_softmaxes.append((call.id, rows_at_once(rows, row_bytes) * row_bytes))
        self._classify(call, func, args, kwargs, frame)
        self.calls.append(call)
        for value in call.fresh:
            self.events.append((EventKind.ALLOC, value))
        self.events.append((EventKind.OP, call.id))
        if frame is not None:
            frame.calls.append(call.id)
        return out

    def _result(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self.fake is not None:
            # the mark of `record_function` is two ops more, which the fake mode would run
            with torch._C._profiler._RecordFunctionFast(MARK) if self.marks else contextlib.nullcontext():
                return self.fake.run(func, args, kwargs)
        with torch.profiler.record_function(MARK) if self.marks else contextlib.nullcontext():
            return func(*args, **kwargs)

    @property
    def dispatched(self) -> list[Call]:
        """The calls that went through the dispatcher, in the order in which a profile numbers them."""
        return [call for call in self.calls if call.name != _FILLED]

    def equals(self) -> list[Equal]:
        """The calls, by the work that they do."""
        found: dict[tuple[Phase, str, int, int, int], list[Call]] = defaultdict(list)
        for call in self.calls:
            moved_bytes = sum(self.storages[v].size_bytes for v in {v for v, _ in call.reads}.union(call.fresh))
            found[call.phase, call.name, call.flops, call.out_bytes, moved_bytes].append(call)
        return [
            Equal(
                name, flops, moved_bytes, tuple(call.id for call in calls),
                tuple(sample for call in calls for sample in call.samples),
            )
            for (_, name, flops, _, moved_bytes), calls in found.items()
        ]  # fmt: skip

    def _read_unwritten(self, value: int) -> None:
        """Something reads what no op has written. A kernel that no mode sees has written it, so making it again needs
        more than the op that allocated it."""
        maker = self.unwritten.pop(value, None)
        if maker is not None and self.storages[value].size_bytes:
            maker.kind = Kind.OPAQUE
            maker.rerunnable = False

    def _classify(self, call: Call, func: Any, args: Any, kwargs: Any, frame: FrameRecord | None) -> None:
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
        saved = self.note_saved(tensor)
        # no plan lets go of a sparse tensor, nor of the indices and values that it holds
        is_thrown_away = self.dry and tensor.layout is torch.strided
        return _Holder(None if is_thrown_away else without_history(tensor), saved, self)

    def note_saved(self, tensor: torch.Tensor) -> int:
        value, _ = self.value_of(tensor)
        if value is None and tensor.layout is torch.sparse_coo:  # a buffer is known by its values
            with _disable_current_modes():
                value = self.live.get(tensor._values().untyped_storage()._cdata)
        if value is None:
            raise Unsupported(f"autograd saves a {tensor.layout} tensor, which has no storage to plan for")
        self._read_unwritten(value)
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
            self.events.append((EventKind.LOAD, holder.saved))
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
            frame = FrameRecord(id=len(self.frames), unit=path, inputs=tuple(inputs))
            self.frames.append(frame)
            self.events.append((EventKind.ENTER, frame.id))
            self.open = frame
            if any(_is_cache(item) for item in (*args, *kwargs.values())):
                frame.pinned = (
                    "it is given a key-value cache, which a second run would append to again "
                    "(PEFT's prefix tuning gives one to every block; LoRA gives none)"
                )
            drawn = _foreign_random_state()
            try:
                return original(*args, **kwargs)
            finally:
                self.open = None
                if _foreign_random_state() != drawn:
                    frame.pinned = "it draws random numbers from Python or NumPy, whose state is not restored"
                frame.exit_versions = {v: self.storages[v].version for v in (*frame.values, *frame.inputs)}
                self.events.append((EventKind.EXIT, frame.id))

        return forward


def _is_cache(item: Any) -> bool:
    """Is this a key-value cache of transformers? It is recognised by its methods, because some models pass a cache of a
    class of their own."""
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


#: Ops that only ask a fake tensor about itself. A real step has no such ops.
_QUERIES = frozenset({torch.ops.prim.device.default})
