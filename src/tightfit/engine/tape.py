"""The ops of one frame that backward will need again, with the arguments that they had.

Idea: while the forward runs, the tape records each *live* op below autograd: the op, its plain arguments, and its
tensor arguments. A tensor argument is recorded in one of two ways. Either it is the tensor itself, which stays: a kept
value, a parameter, something from outside the unit. Or it is a *reference* to a value that another live op makes, with
the shape and strides that were read of it. When backward asks for a dropped value, the tape runs the ops that lead to
it and no others, in their old order, and frees each value after its last reader. No Python of the model runs again: no
module code, no hooks, and no branch that could turn out differently. Everything else (dead ops, views) costs nothing at
all.

A tensor from outside the unit, or a kept one, may have a *source* (`engine.source`) instead of staying. The source
brings it back when an op, or autograd, first wants it. And the tape can make what a unit hands on for other units
(`produce`), as often as they ask.

Invariants:
- The storage that the forward really read decides what a reference means; the plan does not. A tensor that is not known
  to come from a live op is held. So a mistake costs bytes, but never a gradient.
- Each op that runs again reads what it read in forward. To ensure this, ops that write the same value, and ops that
  read it in between, run together in their old order.
- If a tensor on the tape was changed in place after it was recorded, that is an error, as in autograd.

Refused: sparse and subclassed tensors made by live ops, and live ops that write what they did not make (`NotOnTape`;
the frame then does without the tape and replays the unit whole).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from tightfit import accelerator
from tightfit.accelerator import numerics
from tightfit.core import ReplayDiverged
from tightfit.engine.casts import Cast, CastView
from tightfit.engine.source import Source
from tightfit.engine.versions import version_of
from tightfit.step.geometry import Geometry
from tightfit.step.ops import BATCH_NORMS, METADATA_ONLY, op_name
from tightfit.step.run import tensors_in
from tightfit.step.weights import Lender, lender_of


class NotOnTape(Exception):
    """This forward cannot be recorded on a tape. Whoever runs it falls back to running the module again."""


class Reference:
    """Stands for a tensor that a live op makes, in an argument list or in a slot that autograd holds."""

    __slots__ = ("geometry", "state", "value")

    def __init__(self, value: int, geometry: Geometry | None, state: int) -> None:
        self.value = value
        self.geometry = geometry  # None: as the op made it
        self.state = state  # how many ops had written the value


class _Held:
    """A tensor that an op on the tape reads and that stays where it is."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.version: int | None = version_of(tensor)


class _Lent:
    """A copy of a weight that waits off the device, which an op on the tape reads: another copy will do."""

    __slots__ = ("geometry", "lender", "version")

    def __init__(self, tensor: torch.Tensor, lender: Lender) -> None:
        self.geometry, self.lender, self.version = Geometry.of(tensor), lender, lender.version

    def tensor(self) -> torch.Tensor:
        return self.geometry.on(self.lender.copy(self.version))


class _Outline:
    """An argument of which only the shape is read."""

    __slots__ = ("geometry",)

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry

    def tensor(self) -> torch.Tensor:
        size, stride, offset, dtype, *_ = self.geometry
        reach = offset + 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        return torch.empty(max(reach, 0), dtype=dtype, device="meta").as_strided(size, stride, offset)


class _Entry:
    """One live op."""

    __slots__ = (
        "args", "casts", "done", "func", "held", "index", "kwargs", "makes", "reads", "spent", "state", "writes",
    )  # fmt: skip

    def __init__(self, index: int, func: Any) -> None:
        self.index, self.func = index, func
        self.args: Sequence[Any] = ()
        self.kwargs: dict[str, Any] = {}
        self.reads: list[Reference] = []
        self.casts: list[Cast] = []  # that it reads
        self.held: list[_Held] = []
        self.makes: list[tuple[int, int, int]] = []  # (output, value, its bytes)
        self.writes: Sequence[int] = ()  # values that it changes in place
        self.state: torch.Tensor | None = None  # of its generator, before it drew
        self.done = False
        self.spent = False  # its arguments are gone


class TapedOp:
    """What is known about a planned op before it runs. It is the same for every frame of a unit."""

    __slots__ = (
        "draws", "first_random", "for_sweeps", "func", "is_batch_norm", "live", "mutates", "offloads_here", "outputs",
        "plain", "shape_only",
    )  # fmt: skip

    def __init__(
        self,
        func: Any,
        *,
        live: bool,
        writes: bool,
        draws: bool,
        first_random: bool,
        outputs: Sequence[int | None],
        for_sweeps: bool = False,
        offloads_here: bool = False,
    ) -> None:
        self.offloads_here = offloads_here and not live  # something that it makes leaves the device
        self.for_sweeps = for_sweeps  # it never runs for the unit's own backward
        self.func, self.live, self.draws, self.first_random, self.outputs = func, live, draws, first_random, outputs
        self.plain = not (live or writes or first_random or offloads_here)  # it runs as it is
        self.shape_only = func in METADATA_ONLY
        self.is_batch_norm = op_name(func) in BATCH_NORMS
        self.mutates = bool(func._schema.is_mutable) and not self.is_batch_norm


class Tape:
    """The record of a frame's forward, which backward runs in pieces.

    One thing because entries, values and their uses are one graph, which every method walks.
    """

    __slots__ = (
        "__weakref__", "are_as_in_forward", "by_value", "entries", "known", "made", "ran", "settled", "sources",
        "switches", "together", "uses", "written",
    )  # fmt: skip

    def __init__(self, settled: Mapping[int, int], switches: numerics.Switches) -> None:
        self.switches = switches  # under which the forward ran
        self.are_as_in_forward: bool | None = None  # looked at once in each backward
        # kept values that are made again as well -> writes after which they are as they stay, and are held like others
        self.settled = settled
        self.entries: dict[int, _Entry] = {}  # by op ordinal, in order
        # by storage address: the storage, what it holds, the tensor as its op made it
        self.known: dict[int, tuple[Callable[[], Any], int | Cast, Callable[[], Any] | None]] = {}
        self.by_value: dict[int, list[int]] = {}  # value -> ops that make or change it
        self.written: dict[int, int] = {}  # value -> how many ops have written it
        self.uses: dict[int, int] = {}  # value -> references that nobody has followed yet
        self.sources: dict[int, Source] = {}  # values that no op on the tape makes, and where they come from
        self.made: dict[int, torch.Tensor] = {}  # values that are there again
        self.together: dict[int, tuple[int, ...]] | None = None  # op -> ops that run with it
        self.ran = 0

    # -- forward

    def refer(self, tensor: torch.Tensor) -> Reference | CastView | None:
        """A reference to `tensor`, if it lies in a value that a live op made. None: hold the tensor."""
        try:
            storage = tensor.untyped_storage()
        except NotImplementedError:  # sparse
            return None
        found = self.known.get(storage._cdata)
        if found is None or found[0]() is not storage:
            return None
        _, value, as_made = found
        if type(value) is int and self.written[value] == self.settled.get(value):
            return None  # it is kept, and nothing will change it any more
        if as_made is not None and as_made() is tensor:
            return Reference(value, None, self.written[value])  # type: ignore[index,arg-type]  # a value: casts have none
        geometry = Geometry.of(tensor)
        if type(value) is int:
            return Reference(value, geometry, self.written[value])
        assert isinstance(value, Cast)
        if version_of(tensor) != value.version:
            return None  # it was changed in place
        return CastView(value, geometry)

    def address(self, value: int) -> int | None:
        """Where `value` lies in memory, if anybody still holds it. Only valid during the forward."""
        return next((a for a, (alive, known, _) in self.known.items() if known == value and alive() is not None), None)

    def holds(self, tensor: torch.Tensor) -> int | None:
        """The value that `tensor` lies in, if the tape can make that value again."""
        found = self.refer(tensor)
        return found.value if isinstance(found, Reference) else None

    def knows(self, tensor: torch.Tensor) -> bool:
        """Does `tensor` lie in a value that a live op made?"""
        return self.holds(tensor) is not None

    def expect(self, reference: Reference | CastView) -> None:
        """Backward is expected to follow `reference`."""
        if isinstance(reference, CastView):
            reference.cast.uses += 1
        else:
            self.uses[reference.value] = self.uses.get(reference.value, 0) + 1

    def adopt(self, value: int, tensor: torch.Tensor, source: Source) -> None:
        """From here on `tensor`, and every view of it, counts as `value`, which `source` brings back when it is
        wanted."""
        storage = tensor.untyped_storage()
        self.known[storage._cdata] = (weakref.ref(storage), value, None)
        self.written[value] = 1
        self.by_value[value] = []
        self.sources[value] = source

    def cast(self, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:
        """Note that autocast made a cast of a weight."""
        storage = out.untyped_storage()
        self.known[storage._cdata] = (weakref.ref(storage), Cast(func, args, kwargs, out), None)

    def before(self, index: int, taped: TapedOp, args: Any, kwargs: Any) -> _Entry:
        """Record the arguments of live op `index`, which is about to run."""
        func = taped.func
        entry = _Entry(index, func)
        if taped.shape_only:
            source = args[0]
            entry.args = (_Outline(Geometry.of(source)), *args[1:])
            entry.kwargs = {"device": source.device, **{k: v for k, v in kwargs.items() if v is not None}}
            return entry
        encoded = []
        for item in args:
            kind = type(item)
            if kind is torch.Tensor or isinstance(item, torch.Tensor):
                found = self.refer(item)
                if found is None:
                    found = _outside(item, entry)  # type: ignore[assignment]  # whatever stands for the tensor
                elif type(found) is Reference:
                    entry.reads.append(found)
                elif type(found) is CastView:
                    entry.casts.append(found.cast)
                encoded.append(found)
            elif kind is list or kind is tuple:
                encoded.append(self._encoded(item, entry))
            else:
                encoded.append(item)
        entry.args = encoded
        if kwargs:
            entry.kwargs = {k: self._encoded(a, entry) for k, a in kwargs.items()}
        if taped.is_batch_norm:
            for name, item in _named(func, entry.args, entry.kwargs):
                if name.startswith("running_") and isinstance(item, _Held):
                    item.version = None  # it is updated right now, and its content does not matter
        elif taped.mutates:
            entry.writes = self._written(func, entry)
        return entry

    def _written(self, func: Any, entry: _Entry) -> list[int]:
        names = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        found = []
        for name, target in _named(func, entry.args, entry.kwargs):
            if name in names:
                for item in target if isinstance(target, list) else [target]:
                    if isinstance(item, Reference):
                        found.append(item.value)
                    elif item is not None:
                        raise NotOnTape(f"{op_name(func)} writes what the unit did not make")
        return found

    def after(self, entry: _Entry, out: Any, taped: TapedOp) -> None:
        """Live op `entry` has run and given `out`, whose tensors are the values `todo.outputs`."""
        uses, written, outputs = self.uses, self.written, taped.outputs
        if not taped.for_sweeps:
            for reference in entry.reads:
                uses[reference.value] = uses.get(reference.value, 0) + 1
            for cast in entry.casts:
                cast.uses += 1
        for value in entry.writes:
            written[value] += 1
            self.by_value[value].append(entry.index)
        for position, tensor in enumerate([out] if type(out) is torch.Tensor else tensors_in(out)):
            made = outputs[position] if position < len(outputs) else None
            if made is None or made < 0 or made in written:
                continue
            if (
                type(tensor) is not torch.Tensor
                or tensor.layout is not torch.strided
                or tensor.is_conj()
                or tensor.is_neg()
            ):
                raise NotOnTape(f"{op_name(entry.func)} makes a {type(tensor).__name__}")
            storage = tensor.untyped_storage()
            self.known[storage._cdata] = (weakref.ref(storage), made, weakref.ref(tensor))
            written[made] = 1
            self.by_value[made] = [entry.index]
            entry.makes.append((position, made, storage.nbytes()))
        self.entries[entry.index] = entry

    def finish(self) -> None:
        """The forward is over. Raises `NotOnTape` when something on the tape was changed in place after it was
        recorded."""
        self.known.clear()
        for entry in self.entries.values():
            for held in entry.held:
                tensor = held.tensor
                if held.version not in (None, version_of(tensor)):
                    raise NotOnTape("something that a live op read was changed in place later in the unit")
                # its history would hold the tape, and the tape its history; the base of a view that was made without
                # gradients may have one, too
                if tensor.grad_fn is not None or tensor._is_view():
                    held.tensor = tensor.detach()

    def seal(self) -> None:
        """Nothing of the unit's forward will run any more."""
        for source in self.sources.values():
            source.seal()

    def _encoded(self, item: Any, entry: _Entry) -> Any:
        if isinstance(item, torch.Tensor):
            found = self.refer(item)
            if found is None:
                return _outside(item, entry)
            if isinstance(found, Reference):
                entry.reads.append(found)
            else:
                entry.casts.append(found.cast)
            return found
        if isinstance(item, (list, tuple)) and any(isinstance(x, (torch.Tensor, list, tuple)) for x in item):
            return [self._encoded(x, entry) for x in item]
        return item

    # -- backward

    def follow(self, reference: Reference | CastView, *, counted: bool, last: bool) -> torch.Tensor:
        """The tensor that `reference` stands for. `last`: nobody will follow this reference again."""
        if isinstance(reference, CastView):
            with self._forward_again(), torch._C._AutoDispatchBelowAutograd(), torch._C._DisableAutocast():
                tensor = reference.cast.tensor(reference.geometry, keep=not (last and counted))
            if last and counted:
                reference.cast.count_down()
            return tensor
        if not counted:
            self.expect(reference)
        if reference.value not in self.made:
            self._make(reference.value, keep=not last)
        made = self.made[reference.value]
        tensor = made if reference.geometry is None else reference.geometry.on(made)
        if last or not counted:
            self._count_down(reference)
        return tensor

    def produce(self, value: int) -> torch.Tensor:
        """Make `value` for another unit. The tape stays as it is and can make the value again."""
        wanted = self._leading_to(value, self.made)
        if value in self.made:
            return self.made[value]
        left: dict[int, int] = {value: 1}
        for index in wanted:
            for reference in self.entries[index].reads:
                left[reference.value] = left.get(reference.value, 0) + 1
        made = {v: self.made[v] for v in left if v in self.made}
        with (
            self._forward_again(), torch.enable_grad(), torch._C._AutoDispatchBelowAutograd(),
            torch._C._DisableAutocast(),
        ):  # fmt: skip
            for index in wanted:
                entry = self.entries[index]
                # not a `for` loop, whose variable would keep the last tensor alive
                made.update((v, tensor) for v, tensor in self._executed(entry, made, keep=True) if left.get(v))
                for reference in entry.reads:
                    left[reference.value] -= 1
                    if not left[reference.value]:
                        made.pop(reference.value, None)
        return made[value]

    def _forward_again(self) -> AbstractContextManager[None]:
        """The switches of kernels as they stood in forward."""
        if self.are_as_in_forward is None:
            self.are_as_in_forward = numerics.switches() == self.switches
        return nullcontext() if self.are_as_in_forward else numerics.restored(self.switches)

    def forget_made(self) -> None:
        """Drop every value that was made again. All of them can be made once more."""
        self.are_as_in_forward = None
        self.made.clear()
        for source in self.sources.values():
            source.forget()
        for entry in self.entries.values():
            entry.done = False

    def _count_down(self, reference: Reference) -> None:
        left = self.uses[reference.value] = self.uses[reference.value] - 1
        if left <= 0:
            self.made.pop(reference.value, None)

    def _leading_to(self, value: int, made: Mapping[int, torch.Tensor]) -> list[int]:
        """The entries that must run so that `value` is there, in order. Raises `RuntimeError` when they have run."""
        if self.together is None:
            self.together = self._groups()
        wanted: set[int] = set()
        pending = [value]
        while pending:
            value = pending.pop()
            if value in made or value in self.sources:
                continue
            writers = self.by_value.get(value)
            if not writers or self.entries[writers[0]].done or self.entries[writers[0]].spent:
                raise RuntimeError(
                    "trying to backward through the graph a second time, or to read a saved tensor that the planned "
                    "step never read, after what it is made from was freed; use retain_graph=True for the first "
                    "backward, or make the plan with the loss that is trained"
                )
            if writers[0] in wanted:
                continue
            for index in self.together.get(writers[0], (writers[0],)):
                wanted.add(index)
                pending += [reference.value for reference in self.entries[index].reads]
        return sorted(wanted)

    def _make(self, value: int, keep: bool) -> None:
        """Run the entries that lead to `value`. `keep`: leave the tape as it is, so that all of them can run once
        more."""
        if value in self.sources:
            self.made[value] = self.sources[value].take(keep)
            return
        # grad mode as in forward: below autograd it only matters to kernels that then make more (the LSTM cell's)
        with (
            self._forward_again(), torch.enable_grad(), torch._C._AutoDispatchBelowAutograd(),
            torch._C._DisableAutocast(),
        ):  # fmt: skip
            for index in self._leading_to(value, self.made):
                self._run(self.entries[index], keep)

    def _run(self, entry: _Entry, keep: bool) -> None:
        for value, tensor in self._executed(entry, self.made, keep):
            if self.uses.get(value, 0) > 0:
                self.made[value] = tensor
        entry.done = True
        if not keep:
            entry.args, entry.kwargs, entry.held, entry.state = (), {}, [], None
            entry.spent = True
            for reference in entry.reads:
                self._count_down(reference)
            for cast in entry.casts:
                cast.count_down()
            entry.reads, entry.casts = [], []

    def _executed(self, entry: _Entry, made: dict[int, torch.Tensor], keep: bool) -> list[tuple[int, torch.Tensor]]:
        """Run an entry whose inputs are in `made`, and return what it makes, by value."""
        for held in entry.held:
            if held.version not in (None, version_of(held.tensor)):
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation "
                    f"between forward and backward: a tensor of shape {list(held.tensor.shape)}, read by "
                    f"{op_name(entry.func)}, is at version {version_of(held.tensor)}; expected version {held.version}"
                )
        for reference in entry.reads:
            if reference.value not in made:
                made[reference.value] = self.sources[reference.value].take(keep)
        args = [self._decoded(item, made, keep) for item in entry.args]
        kwargs = {name: self._decoded(item, made, keep) for name, item in entry.kwargs.items()} if entry.kwargs else {}
        if op_name(entry.func) in BATCH_NORMS:
            args, kwargs = spare_running_statistics(entry.func, args, kwargs)
        if entry.state is None:
            out = entry.func(*args, **kwargs)
        else:
            generator = generator_of(args, kwargs)
            now = generator.get_state()
            generator.set_state(entry.state)
            try:
                out = entry.func(*args, **kwargs)
            finally:
                generator.set_state(now)
        self.ran += 1
        if not entry.makes:
            return []
        tensors = [out] if isinstance(out, torch.Tensor) else tensors_in(out)
        found = []
        for position, value, nbytes in entry.makes:
            tensor = tensors[position]
            if tensor.untyped_storage().nbytes() != nbytes:
                raise ReplayDiverged(
                    f"{op_name(entry.func)} made {nbytes:,} bytes in forward and "
                    f"{tensor.untyped_storage().nbytes():,} when run again with the same arguments"
                )
            found.append((value, tensor))
        return found

    def _decoded(self, item: Any, made: Mapping[int, torch.Tensor], keep: bool) -> Any:
        kind = type(item)
        if kind is Reference:
            tensor = made[item.value]
            return tensor if item.geometry is None else item.geometry.on(tensor)
        if kind is _Held:
            return item.tensor
        if kind is list:
            return [self._decoded(x, made, keep) for x in item]
        if kind is CastView:
            return item.cast.tensor(item.geometry, keep)
        if kind is _Outline or kind is _Lent:
            return item.tensor()
        return item

    def _groups(self) -> dict[int, tuple[int, ...]]:
        """Ops that must run together, in order, because they change the same value or read it between changes."""
        if all(len(ops) == 1 for ops in self.by_value.values()):
            return {}
        root = {index: index for index in self.entries}

        def find(index: int) -> int:
            while root[index] != index:
                index = root[index]
            return index

        for ops in self.by_value.values():
            for other in ops[1:]:
                root[find(other)] = find(ops[0])
        for index, entry in self.entries.items():
            for reference in entry.reads:
                if reference.state < self.written[reference.value]:
                    root[find(index)] = find(self.by_value[reference.value][0])
        members: dict[int, list[int]] = {}
        for index in self.entries:
            members.setdefault(find(index), []).append(index)
        return {index: tuple(ops) for ops in members.values() if len(ops) > 1 for index in ops}


def _outside(tensor: torch.Tensor, entry: _Entry) -> _Held | _Lent:
    """What stands for a tensor that the tape does not make."""
    lender = lender_of(tensor)
    if lender is not None:
        return _Lent(tensor, lender)
    held = _Held(tensor)
    entry.held.append(held)
    return held


def _named(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
    """Arguments with the names that the op's schema gives them."""
    names = [argument.name for argument in func._schema.arguments]
    return [*zip(names, args, strict=False), *kwargs.items()]


def spare_running_statistics(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A batch norm's arguments with copies of its running statistics: they were updated in forward."""

    def spare(name: str, value: Any) -> Any:
        return value.clone() if name.startswith("running_") and isinstance(value, torch.Tensor) else value

    names = [argument.name for argument in func._schema.arguments]
    return (
        tuple(spare(name, value) for name, value in zip(names, args, strict=False)),
        {name: spare(name, value) for name, value in kwargs.items()},
    )


def generator_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Generator:
    """The generator that a random op draws from: the one it was given, else its device's own."""
    for item in (*args, *kwargs.values()):
        if isinstance(item, torch.Generator):
            return item
    device = kwargs.get("device")
    if device is None:
        tensors = tensors_in((args, kwargs))
        device = tensors[0].device if tensors else accelerator.HOST
    return accelerator.default_generator(torch.device(device))
