"""One call of a unit: run its forward while holding less, and make again what is missing when backward asks.

Idea: autograd's own graph stays as it is. In forward, saved-tensor hooks give autograd either the tensor itself (it is
held) or an empty slot. There are two ways to fill a slot in backward:

- A frame with a plan records its live ops on a tape while they run (`engine.tape`). When backward asks for a slot, the
  tape makes that value again.
- A frame without a plan, or whose forward turns out not to be the planned one, runs the unit's Python again, whole, as
  `torch.utils.checkpoint` does. The first slot that backward asks for fills all of them, in the order in which they
  were saved.

Invariants:
- The forward's ops are compared with the plan one by one. Any difference means a whole replay, counted in `Stats`.
- In a whole replay a slot is only filled with a tensor that the same sequence of ops made, and that is bit for bit what
  the forward saved (`step.checksum`). Anything else is `ReplayDiverged`. Afterwards the unit's buffers and attributes
  are put back.
- Tensors that were held or are read again are checked for in-place changes in between, as autograd itself does.

One thing because the forward's mode, the replay's mode and the slots are three views of one frame's state, and none of
them means anything without the others.

Refused: a whole replay of a unit that changes its inputs in place (`Unsupported`), and a replay after the graph was
freed (torch's own `RuntimeError`).
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._ops import HigherOrderOperator
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tightfit.core import Action, ReplayDiverged, Unsupported
from tightfit.engine.ambient import (
    AmbientState,
    ModuleState,
    activated,
    called_in,
    foreign_random_states,
    kept_as_found,
    restore_foreign_random_states,
)
from tightfit.engine.casts import CastView
from tightfit.engine.chain import Chain
from tightfit.engine.frame_plan import Comparison, FramePlan, Stats
from tightfit.engine.offload import Offloaded, Pool, Shipment
from tightfit.engine.source import Source
from tightfit.engine.tape import NotOnTape, Reference, Tape, TapedOp, generator_of, spare_running_statistics
from tightfit.engine.versions import left_as_it_is, version_of
from tightfit.plan.program import expected
from tightfit.step.checksum import checksum, differs
from tightfit.step.ops import BATCH_NORMS, is_random, is_uncounted, op_name
from tightfit.step.patches import hidden_from_compiler
from tightfit.step.run import tensors_in
from tightfit.step.saved import without_history

_CAST = torch.ops.aten._to_copy.default
_SET = torch.ops.aten.set_.source_Tensor  # uncounted where it changes nothing


class _Stop(BaseException):
    """Ends a replay whose work is done. It is no `Exception`, so that the model's own handlers do not catch it."""


class _Differs(Exception):
    """The replay called another op than the forward did."""


class _Held:
    """A saved tensor that the plan keeps, with the version that it had when it was saved.

    It is held without its history, so that it goes with the graph where no backward comes.
    """

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = without_history(tensor)
        self.version = version_of(self.tensor)

    def get(self) -> torch.Tensor:
        if version_of(self.tensor) != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"a {self.tensor.dtype} tensor of shape {list(self.tensor.shape)} is at version "
                f"{version_of(self.tensor)}; expected version {self.version}"
            )
        return self.tensor


class _Slot:
    """A saved tensor that will be made again: by the tape if there is a reference to it there, else by a whole
    replay."""

    __slots__ = (
        "__weakref__", "checksum", "counted", "dtype", "frame", "index", "place", "reference", "shape", "tensor",
    )  # fmt: skip

    def __init__(
        self, frame: Frame, index: int, tensor: torch.Tensor, reference: Reference | CastView | None = None,
        counted: bool = False,
    ) -> None:  # fmt: skip
        self.frame, self.index = frame, index
        self.reference, self.counted = reference, counted
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self.tensor: torch.Tensor | None = None
        self.checksum: torch.Tensor | int | None = None  # of the forward's tensor, if it is to be compared
        self.place: tuple[Any, ...] | None = None  # where it lies, if it is an argument or a parameter

    def get(self) -> torch.Tensor:
        tensor = self.tensor
        kept = _graph_is_kept()
        if tensor is None:
            tensor = self.frame.saved(self, kept)
        # while the graph is kept, the next backward through it makes the tensor once more
        self.tensor = None if kept else tensor
        return tensor


class _CastSeen(NamedTuple):
    """A copy that the forward made of a weight in another dtype, with the weight's version at that time."""

    source: weakref.ref[torch.Tensor]
    cast: weakref.ref[torch.Tensor]
    version: int


def _graph_is_kept() -> bool:
    """Will there be another backward through the graph that is asking now? Outside of backward there may be."""
    if torch._C._current_graph_task_id() == -1:
        return True
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def _unpack(packed: _Held | _Slot) -> torch.Tensor:
    return packed.get()


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class Frame:
    """One call of a unit. With `plan=None` the frame holds nothing but its inputs, and everything is replayed.

    One thing because forward, saved tensors and replay share the state of one call.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        plan: FramePlan | None,
        stats: Stats,
        module: nn.Module | None = None,
        scrutiny: Comparison | None = None,
        chain: Chain | None = None,
        pool: Pool | None = None,
    ) -> None:
        self.chain = chain
        self.shipment = None if pool is None or plan is None or not plan.offloads else Shipment(pool)
        self.name, self.forward, self.plan, self.stats = name, forward, plan, stats
        self.module = module
        self.scrutiny = scrutiny  # None: nothing that the tape makes is compared
        self.args, self.kwargs = args, kwargs
        self.kept_reads: set[int] = set()  # slots read so far by a backward that keeps its graph
        self.counted = 0  # slots that backward is expected to read
        self.replayed = False
        self.released = False
        self.count = 0  # ops of the forward so far
        self.funcs: list[Any] = []  # the forward's ops, as they came
        self.first_states: list[tuple[torch.Generator, torch.Tensor]] = []
        # autocast's copies of weights: while somebody holds one, a whole replay need not cast again
        self.casts: dict[tuple[int, torch.dtype], _CastSeen] = {}
        self.foreign: dict[str, Any] = {}  # Python's and NumPy's random states at the start
        self.slots: dict[int, weakref.ref[_Slot]] = {}
        self.packed_at: list[int] = []  # per saved tensor: how many ops had run when it was saved
        # Some ops write a tensor that autograd has saved already (rrelu its noise): a replay must not stop before that.
        # Addresses can be used again, so this may be later than need be.
        self.saved_addresses: dict[int, list[int]] = {}  # to the slots
        self.further_results: set[int] = set()  # addresses of what an op made besides its first result
        self.written_to: dict[int, list[weakref.ref[Any]]] = {}  # by op: the storages that it writes
        self.given: set[int] | None = None  # addresses of arguments and parameters, once somebody asks
        self.buffers_after: list[tuple[torch.Tensor, int]] = []  # with their versions when the forward was over
        self.complete_at = 0  # ops to run until every saved tensor has its final content
        self.observe: Callable[[torch.Tensor], None] | None = None  # told of every tensor that is saved
        # entered around the forward and around a whole replay of it
        self.contexts: tuple[AbstractContextManager[Any], AbstractContextManager[Any]] = (nullcontext(), nullcontext())
        self.is_running = False  # is this its forward?
        self.replaying = False
        self.stops_early = True  # a whole replay ends with the last saved tensor, not with the function
        # what the module had in its attributes when the forward began, for a replay of its Python
        self.module_state = ModuleState(module) if plan is None and module is not None else None
        inputs = tensors_in((args, kwargs))
        self.surroundings = AmbientState(t.device for t in inputs)
        # None: the unit's Python will run again
        self.tape: Tape | None = None if plan is None else Tape(plan.settled, self.surroundings.switches)
        own = [] if module is None else list(module.parameters())
        self.versions = [(t, version_of(t)) for t in (*inputs, *own)]

    # -- forward

    def run(self) -> Any:
        """Run the forward and return the unit's output. Autograd gets slots in place of the tensors that the plan
        drops."""
        self.stats.frames += 1
        if self.plan is None:  # planned units that draw from Python or NumPy are pinned, so only regions need this
            self.foreign = foreign_random_states()
        if self.tape is not None:
            self._borrow(self.tape)
        try:
            hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
            self.is_running = True
            with kept_as_found(), activated(), hooks, _Watch(self):
                out = called_in(self.contexts[0], self.name, self.forward, self.args, self.kwargs)
        except BaseException:
            self.tape = None  # it holds tensors whose history holds it
            raise
        finally:
            self.is_running = False
        if self.replayed and self.tape is None:
            self._empty_slots()
        if self.tape is not None:
            assert self.plan is not None
            if self.count != len(self.plan.names):
                self.leave_plan(self.count)
            else:
                self._lend(self.tape, out)
                try:
                    self.tape.finish()
                except NotOnTape:
                    self.leave_plan(self.count)
                else:
                    self._forgo_checksums(self.tape)
        if self.tape is not None:
            self.release()
            if self.shipment is not None:
                self.tape.seal()
                self.shipment.sealed()
                self.stats.held += self.shipment.held
            return out
        for tensor, version in self.versions:
            if version_of(tensor) != version:
                raise Unsupported(
                    f"{self.name} changes a tensor that it is given in place, so it cannot be run again; "
                    "leave it out of the units or clone the tensor first"
                )
        if self.module is not None:
            self.buffers_after = [(buffer, version_of(buffer)) for buffer in self.module.buffers()]
        return out

    def _empty_slots(self) -> None:
        """A backward inside the forward had saved tensors made again: what later ones need is made once more then."""
        self.replayed = False
        for reference in self.slots.values():
            slot = reference()
            if slot is not None and slot.reference is None:
                slot.tensor = None

    def _borrow(self, tape: Tape) -> None:
        """Give the tape a source for each input that is not to be held."""
        plan = self.plan
        assert plan is not None
        if not plan.inputs or self.chain is None:
            return
        for place, tensor in enumerate(_distinct(tensors_in((self.args, self.kwargs)))):
            action = plan.inputs[place] if place < len(plan.inputs) else Action.KEEP
            source: Source | None = None
            if action is Action.RECOMPUTE:
                source = self.chain.borrowed(tensor, self.name)
            elif action is Action.OFFLOAD and self.shipment is not None:
                source = self.shipment.park(tensor)
            if source is not None:
                tape.adopt(plan.values + place, tensor, source)
            elif action is not Action.KEEP:
                self.stats.held += 1

    def park(self, tape: Tape, taped: TapedOp, out: Any) -> None:
        """An op has just made values that are to leave the device: give the tape a source for each."""
        assert self.plan is not None and self.shipment is not None
        for tensor, value in zip([out] if type(out) is torch.Tensor else tensors_in(out), taped.outputs, strict=False):
            if value in self.plan.offload and value not in tape.sources:
                assert value is not None
                tape.adopt(value, tensor, self.shipment.park(tensor, being_written=taped.mutates))

    def _lend(self, tape: Tape, out: Any) -> None:
        """Let later units have the output of this one made again."""
        plan = self.plan
        assert plan is not None
        if plan.lends and self.chain is not None:
            for tensor in tensors_in(out):
                value = tape.holds(tensor)
                if value in plan.lends:
                    self.chain.lend(tensor, self.name, tape, value)

    def leave_plan(self, count: int) -> None:
        """This forward is not the planned one. Keep holding what is held, and replay the whole unit later."""
        assert self.plan is not None and self.tape is not None
        self._compare_whole(self.tape)
        self.tape = None
        self.funcs = self.plan.funcs[:count]
        self.complete_at = sys.maxsize  # which saved tensors were written later was not looked at

    @hidden_from_compiler
    def _pack(self, tensor: torch.Tensor) -> _Held | _Slot:
        index = len(self.packed_at)
        plan = self.plan
        if self.tape is not None:
            assert plan is not None
            self.packed_at.append(self.count)
            # by what the tensor is, not by its number: a call whose input needs no gradient saves fewer of them
            try:
                reference = self.tape.refer(tensor)
            except NotOnTape:
                reference = None
            if reference is None or not plan.brings_back(reference):
                return _Held(tensor)
            known_as = -1
            if isinstance(reference, Reference):
                source = self.tape.sources.get(reference.value)
                if isinstance(source, Offloaded):
                    source.settle()
                known_as = reference.value if reference.value < plan.values else -1
            counted = expected(plan.slots, plan.wanted, index, known_as)
            if counted is None:
                return _Held(tensor)
            if counted:
                self.tape.expect(reference)
            slot = _Slot(self, index, tensor, reference, counted)
            self.counted += counted
            if self.scrutiny is not None and self.scrutiny.wants(index) and tensor.numel():
                slot.checksum = checksum(tensor)
        else:
            self.packed_at.append(len(self.funcs))
            address = _address(tensor)
            self.saved_addresses.setdefault(address, []).append(index)
            if self.observe is not None:
                self.observe(tensor)
            slot = _Slot(self, index, tensor)
            if self._is_given(address):
                slot.place = _place(tensor)
            elif tensor.numel() and address not in self.further_results:
                slot.checksum = checksum(tensor)
        self.slots[index] = weakref.ref(slot)
        return slot

    def _is_given(self, address: int) -> bool:
        """Is this an argument or a parameter? Then it is enough that the replay saves the same one, unchanged."""
        if self.given is None:
            self.given = {_address(tensor) for tensor, _ in self.versions}
        return address in self.given

    def _forgo_checksums(self, tape: Tape) -> None:
        """Drop the checksums of saved tensors that cannot be compared. These are tensors that were written again after
        autograd saved them; an op's further outputs, such as workspaces and statistics, of which parts may never be
        written; and outputs of ops that come out anew each time."""
        results = _first_results(tape)
        for slot in self._tape_slots():
            # a cast gives the same bits again, if the weight has not changed in a way that no version tells
            steady = isinstance(slot.reference, CastView) or _is_steady(slot.reference, tape, results)
            if not steady:
                slot.checksum = None
            if self.scrutiny is not None and not (steady and slot.counted):  # nothing to compare, or never read
                self.scrutiny.compared.add(slot.index)

    def _tape_slots(self) -> Iterator[_Slot]:
        for known in self.slots.values():
            slot = known()
            if slot is not None and slot.reference is not None:
                yield slot

    def _compare_whole(self, tape: Tape) -> None:
        """The forward leaves the plan: make sure that the whole replay compares what the tape was to make again.

        What was saved so far may be gone and have no checksum. The tape can make it once more, this one time.
        """
        if self.scrutiny is not None:
            self.scrutiny.leaves = True
        results = _first_results(tape)
        ran = tape.ran
        for slot in self._tape_slots():
            reference = slot.reference
            if not _is_steady(reference, tape, results):
                slot.checksum = None
                continue
            assert isinstance(reference, Reference)
            if slot.checksum is None and slot.shape.numel():
                with contextlib.suppress(ReplayDiverged, RuntimeError):  # what it is made from is changed already
                    slot.checksum = checksum(tape.follow(reference, counted=False, last=False))
            address = tape.address(reference.value)
            if address is not None:
                self.saved_addresses.setdefault(address, []).append(slot.index)
        tape.forget_made()
        self.stats.rerun_ops += tape.ran - ran

    def written_after_saving(self, address: int) -> bool:
        """An op writes at `address`. What autograd has saved of it is not yet what backward will read."""
        found = self.saved_addresses.get(address)
        if found is None:
            return False
        for index in found:
            slot = self.slots[index]()
            if slot is not None:
                slot.checksum = None
        return True

    # -- backward

    def saved(self, slot: _Slot, kept: bool) -> torch.Tensor:
        """The tensor of an empty slot. `kept`: another backward will walk through the graph."""
        if self.is_running and self.tape is not None:  # a backward inside the forward
            self.leave_plan(self.count)
        tape = self.tape
        if tape is None or slot.reference is None:
            self._replay_whole()
            tensor = slot.tensor
            if tensor is None:
                raise ReplayDiverged(f"{self.name}: the replay did not make saved tensor {slot.index} again")
            return tensor
        if self.kept_reads and not kept:
            tape.forget_made()
            self.kept_reads.clear()
        before = tape.ran
        try:
            tensor = tape.follow(slot.reference, counted=slot.counted, last=not kept)
        except ReplayDiverged as error:
            raise ReplayDiverged(f"{self.name}: {error}") from None
        except RuntimeError as error:
            raise type(error)(f"{self.name}: {error}") from None
        finally:
            self.stats.rerun_ops += tape.ran - before
            if tape.ran > before and not self.replayed:
                self.replayed = True
                self.stats.replays += 1
        if slot.checksum is not None:
            if differs(tensor, slot.checksum):
                raise ReplayDiverged(
                    f"{self.name}: a saved tensor of shape {list(tensor.shape)} came out different when it was made "
                    "again: something that torch does not see writes it (NumPy, a kernel of its own), or an op is not "
                    "deterministic; leave this unit out of the units"
                )
            if self.scrutiny is not None:
                self.scrutiny.compared.add(slot.index)
        if kept and slot.counted:
            self.kept_reads.add(slot.index)
            if len(self.kept_reads) == self.counted:  # this pass is through with the frame; the next makes all anew
                tape.forget_made()
                self.kept_reads.clear()
                self.replayed = False
        return tensor

    def _replay_whole(self) -> None:
        """Run the unit's Python again and fill every slot that autograd still holds."""
        if self.released:
            raise RuntimeError(
                f"{self.name}: trying to backward through the graph a second time, after its inputs were freed; use "
                "retain_graph=True for the first backward"
            )
        self.stats.replays += 1
        if self.plan is not None:
            self.stats.fallbacks += 1
        self.replaying = True
        try:
            self._replay()
        finally:
            self.replaying = False
        if self.is_running:
            self.replayed = True
        elif not _graph_is_kept():
            self.release()

    def release(self) -> None:
        """Let go of everything except the slots and the tape."""
        self.released = True
        self.args, self.kwargs = (), {}
        self.versions, self.funcs, self.first_states = [], [], []
        self.module_state = None
        self.written_to = {}
        self.saved_addresses, self.further_results, self.given, self.buffers_after = {}, set(), None, []

    def _replay(self) -> None:
        waiting: dict[int, _Slot] = {}
        for index, reference in self.slots.items():
            slot = reference()
            if slot is not None and slot.tensor is None:
                waiting[index] = slot
        mode = _Replay(self)
        refilled = 0
        # if an op is not deterministic, a difference says nothing about the module
        compare = not any(torch.Tag.nondeterministic_bitwise in getattr(func, "tags", ()) for func in self.funcs)

        @hidden_from_compiler
        def refill(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal refilled
            index = refilled
            refilled += 1
            slot = waiting.pop(index, None)
            if index >= len(self.packed_at) or mode.count != self.packed_at[index]:
                raise _Differs(f"saved tensor {index} is not saved by the same op")
            if slot is not None:
                if tensor.shape != slot.shape or tensor.dtype != slot.dtype:
                    raise ReplayDiverged(
                        f"{self.name}: saved tensor {index} was {tuple(slot.shape)} {slot.dtype} in forward and is "
                        f"{tuple(tensor.shape)} {tensor.dtype} in replay"
                    )
                if mode.stale:
                    mode.refuse_stale(tensor)
                if slot.place is not None and slot.place != _place(tensor):
                    raise ReplayDiverged(
                        f"{self.name} does not do the same twice: saved tensor {index}, of shape {list(tensor.shape)}, "
                        "is an argument or a parameter, and is another one in replay; its gradients would be wrong, so "
                        "backward stops here"
                    )
                if compare and slot.checksum is not None and differs(tensor, slot.checksum):
                    raise ReplayDiverged(
                        f"{self.name} does not do the same twice: saved tensor {index}, of shape "
                        f"{list(tensor.shape)}, has other values in replay than in forward (a counter, a buffer that "
                        "is updated and read, an op that is not deterministic); its gradients would be wrong, so "
                        "backward stops here; leave this unit out of the units"
                    )
                slot.tensor = tensor.detach()
                mode.filled = not waiting
                mode.stop_if_done()
            return tensor.detach()  # for a backward inside the function, which runs again as well

        cuts: dict[int, torch.Tensor] = {}  # a tensor that is given twice is one tensor in replay, too

        def cut(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in cuts:
                cuts[id(tensor)] = _cut_off(tensor)
            return cuts[id(tensor)]

        args, kwargs = pytree.tree_map_only(torch.Tensor, cut, (self.args, self.kwargs))
        generators = list(dict.fromkeys(generator for generator, _ in self.first_states))
        saved_states = [generator.get_state() for generator in generators]
        foreign = foreign_random_states() if self.foreign else {}
        hooks = torch.autograd.graph.saved_tensors_hooks(refill, _as_it_is)
        module_state = ModuleState(self.module)
        if self.module_state is not None:  # a cache that the forward filled is empty again
            self.module_state.put_back()
        try:
            with (
                kept_as_found(), activated(), torch.enable_grad(), self.surroundings.restored(), hooks, mode,
                self.contexts[1],
            ):  # fmt: skip
                restore_foreign_random_states(self.foreign)
                self.forward(*args, **kwargs)
        except _Stop:
            pass
        except _Differs as error:
            raise ReplayDiverged(
                f"{self.name} does not do the same twice: {error}; its gradients would be wrong, so backward stops here"
            ) from None
        finally:
            for generator, state in zip(generators, saved_states, strict=True):
                generator.set_state(state)
            restore_foreign_random_states(foreign)
            module_state.put_back()
            self.buffers_after = [(b, version_of(b)) for b, _ in self.buffers_after if _address(b) in mode.as_left]
            self.stats.rerun_ops += mode.ran
        if waiting:
            raise ReplayDiverged(
                f"{self.name}: {len(waiting)} of {len(self.packed_at)} saved tensors of the forward were not made again"
            )


def _distinct(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """One tensor for each storage, in order, as the trace counts inputs."""
    found: dict[int, torch.Tensor] = {}
    for tensor in tensors:
        if tensor.layout is torch.strided:
            with contextlib.suppress(NotImplementedError):  # a subclass without a storage
                found.setdefault(int(tensor.untyped_storage()._cdata), tensor)
    return list(found.values())


def _first_results(tape: Tape) -> set[int]:
    """The values that are the first result of a live op, or that a source brings. Empty if any live op is not
    deterministic."""
    entries = tape.entries.values()
    if any(torch.Tag.nondeterministic_bitwise in entry.func.tags for entry in entries):
        return set()
    made = {value for entry in entries for position, value, _ in entry.makes if position == 0}
    return made.union(tape.sources)


def _is_steady(reference: Reference | CastView | None, tape: Tape, results: set[int]) -> bool:
    """Is what autograd saved the last state of its value, and does making it again give the same bits?"""
    return (
        isinstance(reference, Reference)
        and reference.value in results
        and reference.state == tape.written[reference.value]
    )


class _Cut(torch.autograd.Function):
    """The same data, with a history that leads nowhere."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError("a replay's own graph is never run backward")


def _cut_off(tensor: torch.Tensor) -> torch.Tensor:
    """The same data without its history, so that the replay's graph ends at the unit's inputs.

    A leaf has none, and stays what it is. So does a tensor of a subclass, which a custom function would make plain; its
    history is never run. Of another tensor the result is no leaf either: autocast, and so `is_uncounted`, would take a
    leaf for a weight.
    """
    if tensor.is_leaf or not tensor.requires_grad or type(tensor) is not torch.Tensor:
        return tensor
    with torch.enable_grad():
        cut: torch.Tensor = _Cut.apply(tensor.detach(), torch.empty(0, requires_grad=True))
    return cut


class _Mode(TorchDispatchMode):
    """What torch asks of a dispatch mode, answered for both of a frame's modes."""

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No wrapper hides the handler from the compiler: it would take as long as all the rest. See
        `hidden_from_compiler`."""
        return False

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Functions that are compiled run compiled inside a unit, too."""
        return True

    def __exit__(self, kind: Any, error: Any, where: Any) -> None:
        try:
            super().__exit__(kind, error, where)
        except RuntimeError:  # Ctrl-C came while torch had the modes off: `kept_as_found` puts them back
            if not isinstance(error, KeyboardInterrupt):
                raise


class _Watch(_Mode):
    """A dispatch mode for a frame's forward. With a plan it compares the ops with the planned ones and records the live
    ones; without a plan it only notes the ops."""

    def __init__(self, frame: Frame) -> None:
        super().__init__()
        self.frame = frame

    @hidden_from_compiler
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        frame = self.frame
        tape, index = frame.tape, frame.count
        if tape is not None:
            plan = frame.plan
            assert plan is not None
            taped = plan.taped[index] if index < len(plan.taped) else None
            if taped is not None and taped.func is func:
                frame.count = index + 1
                if taped.plain:
                    return func(*args, **kwargs) if kwargs else func(*args)
                return self._taken_down(taped, tape, index, args, kwargs or {})
        if frame.replaying:  # a backward inside the forward asks for what it saved: none of the forward's own ops
            return func(*args, **(kwargs or {}))
        if isinstance(func, HigherOrderOperator):
            if tape is not None:
                frame.leave_plan(index)
            frame.count = index + 1
            frame.funcs.append(func)
            return func(*args, **(kwargs or {}))
        if is_uncounted(func, args, kwargs or {}):
            if func is _SET:
                left_as_it_is(args[0])
            out = func(*args, **(kwargs or {}))
            if func is _CAST:
                frame.casts[id(args[0]), out.dtype] = _CastSeen(weakref.ref(args[0]), weakref.ref(out), version_of(out))
                if tape is not None:
                    tape.cast(func, args, kwargs or {}, out)
            return out
        frame.count = index + 1
        if tape is not None:
            assert plan is not None
            if index < len(plan.names) and plan.names[index] == op_name(func):
                taped = TapedOp(
                    func, live=plan.live[index], writes=plan.writes[index], draws=index in plan.states,
                    first_random=index == plan.first_random, outputs=plan.outputs[index],
                    for_sweeps=index in plan.for_sweeps,
                    offloads_here=index in plan.offloads_here,
                )  # fmt: skip
                plan.funcs[index] = func
                if func is not _CAST:
                    plan.taped[index] = taped
                return self._taken_down(taped, tape, index, args, kwargs or {})
            frame.leave_plan(index)
        return self._noted(index, func, args, kwargs or {})

    def _taken_down(self, taped: TapedOp, tape: Tape, index: int, args: Any, kwargs: Any) -> Any:
        func = taped.func
        state = None
        if taped.draws or taped.first_random:
            generator = generator_of(args, kwargs)
            state = generator.get_state()
            if taped.first_random:  # for a whole replay, should this forward leave the plan
                self.frame.first_states.append((generator, state))
        try:
            if not taped.live:
                if taped.mutates and any(tape.knows(t) for t in tensors_in(_written_arguments(func, args, kwargs))):
                    raise NotOnTape(f"{op_name(func)} changes a value that was to be made again")
                out = func(*args, **kwargs)
                if taped.offloads_here:
                    self.frame.park(tape, taped, out)
                return out
            entry = tape.before(index, taped, args, kwargs)
        except NotOnTape:
            self.frame.leave_plan(index + 1)
            return func(*args, **kwargs)
        if taped.draws:
            entry.state = state
        out = func(*args, **kwargs) if kwargs else func(*args)
        try:
            tape.after(entry, out, taped)
        except NotOnTape:
            self.frame.leave_plan(index + 1)
        return out

    def _noted(self, index: int, func: Any, args: Any, kwargs: Any) -> Any:
        frame = self.frame
        frame.funcs.append(func)
        if is_random(func, args, kwargs):
            generator = generator_of(args, kwargs)
            if all(known is not generator for known, _ in frame.first_states):
                frame.first_states.append((generator, generator.get_state()))
        out = func(*args, **kwargs)
        if func._schema.is_mutable:
            for tensor in tensors_in(_written_arguments(func, args, kwargs)):
                frame.written_to.setdefault(index, []).append(weakref.ref(_storage(tensor)))
                if frame.written_after_saving(_address(tensor)):
                    frame.complete_at = max(frame.complete_at, index + 1)
        elif op_name(func) in BATCH_NORMS:  # it writes its running statistics, which autograd saved before
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.name.startswith("running_") and isinstance(value, torch.Tensor):
                    frame.written_after_saving(_address(value))
        if type(out) is torch.Tensor:
            frame.further_results.discard(_address(out))
        else:
            for position, tensor in enumerate(tensors_in(out)):
                (frame.further_results.add if position else frame.further_results.discard)(_address(tensor))
        return out


class _Replay(_Mode):
    """A dispatch mode for a whole replay. It runs every op again, refuses another sequence of ops, and writes nothing
    outside the unit twice."""

    def __init__(self, frame: Frame) -> None:
        super().__init__()
        self.frame = frame
        self.count = self.ran = 0
        self.filled = False  # has every slot that waits its tensor?
        self.drawn: set[int] = set()
        # buffers that nobody has written since the forward was over; a write that is left out counts as a version, too
        self.as_left = {_address(buffer) for buffer, version in frame.buffers_after if version_of(buffer) == version}
        # arguments and parameters that were changed since the forward: reading one would make other values
        self.stale = {
            _address(tensor): (tensor, version) for tensor, version in frame.versions if version_of(tensor) != version
        }
        # what it learns about storages as it runs
        self.made: set[int] = set()
        self.read: set[int] = set()
        self.changed: set[int] = set()

    @hidden_from_compiler
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        frame = self.frame
        if not isinstance(func, HigherOrderOperator) and is_uncounted(func, args, kwargs):
            if func is _CAST and (seen := frame.casts.get((id(args[0]), kwargs["dtype"]))) is not None:
                cast = seen.cast()
                if cast is not None and seen.source() is args[0] and version_of(cast) == seen.version:
                    return cast.detach()
            if func is _SET:
                left_as_it_is(args[0])
            out = func(*args, **kwargs)
            if func is _CAST:
                self.made.add(_address(out))
            return out
        index = self.count
        self.count += 1
        if index >= len(frame.funcs) or frame.funcs[index] is not func:
            expected = op_name(frame.funcs[index]) if index < len(frame.funcs) else "the end"
            raise _Differs(f"op {index} was {expected} in forward and is {op_name(func)} in replay")
        if self.stale:
            self.refuse_stale((args, kwargs))
        out = self._result(func, args, kwargs)
        self.stop_if_done()
        return out

    def refuse_stale(self, read: Any) -> None:
        """Raise torch's own error for an argument or a parameter that is not what it was in forward."""
        for tensor in tensors_in(read):
            changed, version = self.stale.get(_address(tensor), (None, 0))
            if changed is not None:
                raise RuntimeError(
                    f"{self.frame.name}: one of the variables needed for gradient computation has been modified by an "
                    f"inplace operation between forward and backward: shape {list(changed.shape)} is at version "
                    f"{version_of(changed)}; expected version {version}"
                )

    def stop_if_done(self) -> None:
        """End the replay once every slot is filled, and nothing more is written to the tensors that fill them."""
        early = self.frame.stops_early or self.frame.is_running
        if self.filled and self.count >= self.frame.complete_at and early:
            raise _Stop

    def _result(self, func: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(func, HigherOrderOperator):
            out = func(*args, **kwargs)
            self.made.update(_address(t) for t in tensors_in(out))
            return out
        if is_random(func, args, kwargs):
            self._rewind(generator_of(args, kwargs))
        self.ran += 1
        if op_name(func) in BATCH_NORMS:
            args, kwargs = spare_running_statistics(func, args, kwargs)
        elif (skipped := self._outside_effect(func, args, kwargs)) is not None:
            return skipped
        out = func(*args, **kwargs)
        self.made.update(_address(t) for t in tensors_in(out))
        return out

    def _rewind(self, generator: torch.Generator) -> None:
        for known, state in self.frame.first_states:
            if known is generator and id(generator) not in self.drawn:
                self.drawn.add(id(generator))
                generator.set_state(state)

    def _outside_effect(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an op that writes to outside storage returns, without writing it again.

        None when the op writes nothing outside. Raises `ReplayDiverged` when the unit also reads what it writes there,
        since the value that it read is gone. A buffer that the unit reads only after its last write is no such case.
        """
        addresses = {_address(t) for t in tensors_in((args, kwargs))}
        written: set[int] = set()
        if func._schema.is_mutable:
            written = {_address(t) for t in tensors_in(_written_arguments(func, args, kwargs))} - self.made
            wrote = self.frame.written_to.get(self.count - 1)
            if written and wrote and all(storage() is None for storage in wrote):
                # compiled code makes buffers that no mode sees; what the forward wrote was its own, since it is gone
                self.made |= written
                written = set()
        outside = addresses - self.made
        read_after = (self.changed & outside) - written
        if written & self.read or not read_after <= self.as_left:
            raise ReplayDiverged(
                f"{self.frame.name} reads a tensor from outside that it also changes in place ({op_name(func)}): "
                "what it read is gone, so it cannot be run again"
            )
        if written:
            self.changed |= written
            arguments = _written_arguments(func, args, kwargs)
            if len(func._schema.returns) > len(arguments):
                raise ReplayDiverged(
                    f"{self.frame.name} calls {op_name(func)}, which makes a result and changes a tensor from outside "
                    "at once, so it cannot be run again"
                )
            return arguments[0] if len(func._schema.returns) == 1 else tuple(arguments)
        self.read |= outside
        return None


def _place(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    """Storage, offset and strides; None for a tensor that has none of its own."""
    if tensor.layout is not torch.strided or type(tensor) not in (torch.Tensor, nn.Parameter):
        return None
    return _address(tensor), tensor.storage_offset(), tensor.stride()


def _storage(tensor: torch.Tensor) -> Any:
    return tensor.untyped_storage() if tensor.layout is torch.strided else tensor


def _address(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else id(tensor)


def _written_arguments(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that an in-place or out= op writes, in the order of its schema."""
    if not func._schema.is_mutable:
        return []
    return [
        kwargs.get(argument.name, args[position] if position < len(args) else None)
        for position, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
