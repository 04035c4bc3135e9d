"""The referee of plans: what a step does to memory under a plan, computed from the trace alone.

Idea: a storage is live from its making until the last of its holders lets go. Python holds it until its natural end.
Each saved tensor holds it until autograd releases that saved tensor. A plan removes some holders (the saved tensors
that it drops). It adds others (the tape holds what its ops will read, until they have run). And it inserts the ops that
run again, just before the first backward read that needs them. The referee walks through the events in order and adds
up the live bytes after each.

Invariant: nothing of the planner's model is used here. With `plan=None` the result is the recorded step itself.
Refused: a plan that was made from another trace (`PlanMismatch`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from tightfit.core import (
    Action,
    Advance,
    Category,
    Choice,
    EventKind,
    InvalidInput,
    Plan,
    PlanMismatch,
    Saved,
    Timeline,
    Trace,
)
from tightfit.core.by_trace import LatestOfTraces
from tightfit.levers import every, require_known
from tightfit.plan.casts import dropped_casts
from tightfit.plan.indexed import PLACE, STATIC, indexed, without_collecting
from tightfit.plan.program import (
    Recipe,
    demanded,
    dropped_slots,
    first_random,
    kept_values,
    leading_to,
    offloaded_values,
    reads_copy,
    recipe,
)
from tightfit.plan.shipping import Shipments

_SAVED, _TEMPORARIES = PLACE[Category.SAVED], PLACE[Category.TEMPORARIES]


def simulate(trace: Trace, plan: Plan | None = None) -> Timeline:
    """Live bytes through the step of `trace` under `plan` (`None`: no checkpointing).

    The timeline has one entry per allocation, op and release, in order, replays included. Raises
    `PlanMismatch` when the plan belongs to another trace.
    """
    if plan is not None and plan.trace_digest != trace.digest:
        raise PlanMismatch(
            f"the plan was made from trace {plan.trace_digest}, this is trace {trace.digest}; make the plan anew"
        )
    return simulate_choices(under(trace, plan), *(((),) if plan is None else (plan.choices, plan.advances)))


def under(trace: Trace, plan: Plan | None) -> Trace:
    """The trace as the levers of `plan` change it. Raises `PlanMismatch` where the trace does not have what a lever
    needs."""
    if plan is not None:
        require_known(plan)
        for lever in every():
            trace = lever.under(trace, plan)
    return trace


def allocations(trace: Trace, plan: Plan | None = None) -> tuple[list[int], _Blocks]:
    """What an allocator sees of the step: the sizes of the blocks that live throughout, and (name, bytes) for each
    block that is taken later, in order. Where a block is given back, the bytes are negative.

    The blocks that live throughout are those of the trace's values from before the step. The static bytes may hold more
    than these. Kernels' workspaces are two blocks, the forward's and the backward's. The rest (optimizer state,
    gradients) is divided into blocks of the sizes of the trainable parameters' gradients.
    """
    trace = under(trace, plan)
    _, blocks = _walked(trace, *(((), ()) if plan is None else (plan.choices, plan.advances)))
    total = sum(trace.static_bytes.values())
    workspace = trace.static_bytes.get(Category.WORKSPACE.value, 0)
    static = []
    rest = total - workspace
    for value in trace.values:
        if value.producer is None and 0 < value.size_bytes <= rest:
            static.append(value.size_bytes)
            rest -= value.size_bytes
    pieces = [v.size_bytes for v in trace.values if v.category is Category.GRADIENTS and v.size_bytes]
    while rest > 0 and pieces:
        for piece in pieces:
            static.append(min(piece, rest))
            rest -= static[-1]
            if rest <= 0:
                break
    static += [size for size in (rest, workspace - workspace // 2, workspace // 2) if size > 0]
    return static, list(blocks)


def simulate_choices(trace: Trace, choices: tuple[Choice, ...], advances: tuple[Advance, ...] = ()) -> Timeline:
    """`simulate` for choices of which no `Plan` is made yet."""
    return _walked(trace, choices, advances)[0]


_Blocks = list[tuple[Hashable, int]]

#: A search asks again about the step without a plan, and about the plan that it has just found.
_WALKED: LatestOfTraces[tuple[Timeline, _Blocks]] = LatestOfTraces(6)


def _walked(trace: Trace, choices: tuple[Choice, ...], advances: tuple[Advance, ...]) -> tuple[Timeline, _Blocks]:
    """What a walk says, and the blocks that it sees."""
    with without_collecting():
        return _WALKED.of(trace, (choices, advances), lambda: Walk(trace, choices, advances).whole())


@dataclass
class Replayed:
    """One frame in which something runs again."""

    frame: int
    recipe: Recipe
    slots: tuple[tuple[Saved, bool], ...]  # dropped saved tensors; does the tape keep their values for a reader?
    casts: frozenset[int]  # ids of autocast's copies of weights that it makes anew
    batches: tuple[tuple[int, tuple[int, ...]], ...]  # (event before which they run, op ordinals)
    states_in_forward: int  # saved generator states while the forward runs
    fetched: frozenset[int]  # value ids that the frame reads in backward and that are not held for it till then
    parked: frozenset[int]  # those of them that wait off the device; sweeps make the others again
    fetches: tuple[tuple[int, int], ...]  # (event before which autograd asks, one of `fetched`)
    left_states: int  # saved generator states that go with the tape: of random ops that nothing of its own asks for


@dataclass
class _Copy:
    """A value that backward needs and that is not held for it: made again, or fetched."""

    size_bytes: int
    readers: set[int]  # ops that have yet to read it
    until: int | None  # event at which autograd lets go of it; None: it does not hold it
    is_live: bool = False
    stays: bool = False  # when a sweep passes it


class Walk:
    """The referee's walk over the events of one step.

    One thing because the lives of storages and the levels of live bytes come from one walk.
    """

    def __init__(self, trace: Trace, choices: tuple[Choice, ...], advances: tuple[Advance, ...] = ()) -> None:
        self.trace, self.index = trace, indexed(trace)
        self.stores = {(sweep.base, sweep.target): frozenset(sweep.stores) for sweep in advances}
        self.ops_of, self.values_of = self.index.ops_of, self.index.values_of
        self.replays = self._replays({choice.unit: choice for choice in choices})
        self.blocks: list[tuple[Hashable, int]] = []  # what an allocator sees, in order
        self.at = 0  # the event that the walk has come to

    # -- which frames replay, and when

    def _replays(self, choices: dict[str, Choice]) -> dict[int, Replayed]:
        trace = self.trace
        load_event, slots = self.index.first_load, self.index.slots_of
        found = {}
        for frame in trace.frames:
            choice = choices.get(frame.unit)
            if choice is None or choice.keeps_all:
                continue
            program, planned = trace.programs[frame.id], self.index.program_of(frame.unit)
            if planned is None:
                raise InvalidInput(f"the calls of {frame.unit!r} run different ops, so no plan can serve them all")
            if len(choice.actions) != planned.values:
                raise InvalidInput(
                    f"the choice for {frame.unit!r} has {len(choice.actions)} actions, not {planned.values}"
                )
            chosen = recipe(planned, kept_values(choice.actions), frozenset(choice.lends))
            given = dict(zip(frame.inputs, choice.inputs, strict=False))
            swept = {v for v, action in given.items() if action is Action.RECOMPUTE and self._is_lent(v, choices)}
            parked = {v for v, action in given.items() if action is Action.OFFLOAD}
            parked |= {self.values_of[frame.id][v] for v in offloaded_values(choice.actions)}
            fetched = frozenset(swept | parked)
            dropped = [(slots[frame.id][i], counted) for i, counted in dropped_slots(planned, program, chosen)]
            # if backward reads no dropped tensor of this frame, nothing runs again for the frame itself
            loads = sorted((load_event[s.id], s.ordinal) for s, _ in dropped if s.id in load_event)
            from_outside = [s for s in slots[frame.id] if s.value in fetched]
            casts = self.index.casts_of[frame.id] if chosen.replays else {}
            anew = dropped_casts(planned, [s for s in slots[frame.id] if s.value in casts])
            if not loads and not fetched and not choice.lends and not anew:
                continue
            event_of = {i: event for event, i in loads}
            ran = demanded(program, chosen, tuple(i for _, i in loads))
            batches = tuple((event_of[i], ops) for i, ops in ran)
            first = first_random(program)
            found[frame.id] = Replayed(
                frame=frame.id, recipe=chosen, batches=batches,
                slots=(*dropped, *anew, *((s, s.read) for s in from_outside)),
                casts=frozenset(casts),
                states_in_forward=len(chosen.states | ({first} if first is not None else set())),
                fetched=fetched,
                parked=frozenset(parked),
                fetches=tuple((load_event[s.id], s.value) for s in from_outside if s.id in load_event),
                left_states=len(chosen.states.difference(*(ops for _, ops in batches))),
            )  # fmt: skip
        return found

    def _is_lent(self, value_id: int, choices: dict[str, Choice]) -> bool:
        """Will the unit that made the value make it again for others? If not, the engine holds the value."""
        value = self.trace.values[value_id]
        maker = None if value.unit is None else choices.get(value.unit)
        return maker is not None and value.ordinal in maker.lends

    # -- lives

    def _lives(self) -> dict[int, list[int]]:
        """The values that are freed after an event, for the events at which it is not as without a plan. A value that
        stands at no event lives to the end of the step."""
        trace, index = self.trace, self.index
        released, exits, slots_of = index.released, index.exits, index.slots_of
        end_of_step = len(trace.events)
        self.packed_at: dict[int, int] = {}
        dropped = {saved.id: saved.value for each in self.replays.values() for saved, _ in each.slots}
        self.shipments = Shipments(
            {each.frame: exits[each.frame] for each in self.replays.values() if each.parked},
            self._openings(), end_of_step, copies_beside=trace.copies_beside,
        )  # fmt: skip
        for replayed in self.replays.values():
            for value_id in replayed.parked:
                self.packed_at[value_id] = max(self.packed_at.get(value_id, -1), self.shipments.landed[replayed.frame])
        ends = index.ends.copy()
        for value_id in set(dropped.values()):
            natural = trace.values[value_id].natural_end
            kept = [released.get(s.id, end_of_step) for s in index.saved_of[value_id] if s.id not in dropped]
            ends[value_id] = max(
                ends[value_id] if natural is None else natural, self.packed_at.get(value_id, -1), *kept, -1
            )
        self.tape_readers: dict[int, set[int]] = defaultdict(set)  # value -> ops that will read it once more
        self.copies: dict[int, _Copy] = {}
        self.tapes_end: dict[int, int] = defaultdict(int)  # event -> generator states that go there
        self.brought: dict[tuple[int, int], _Copy] = {}  # by frame and value id, what is not held for the frame
        for replayed in self.replays.values():
            last_release = max((released.get(s.id, end_of_step) for s in slots_of[replayed.frame]), default=-1)
            if replayed.left_states:
                self.tapes_end[last_release] += replayed.left_states
            made = {v for op in replayed.recipe.runs for v in self.index.made_of[replayed.frame][op]}
            running = {op: event for event, ops in replayed.batches for op in ops}
            for ordinal in replayed.recipe.runs:
                op = self.ops_of[replayed.frame][ordinal]
                for value_id in op.inputs:
                    if (
                        value_id in replayed.fetched
                        or value_id in replayed.casts
                        or (value_id in made and self._reads_copy(replayed, ordinal, value_id))
                    ):
                        continue
                    if ordinal in running:
                        self.tape_readers[value_id].add(op.id)
                    else:  # nobody asks for it in this call; the tape goes with the graph
                        ends[value_id] = max(ends[value_id], last_release)
            held: dict[int, list[int]] = defaultdict(list)  # value -> releases of what holds it once it is there again
            for saved, counted in replayed.slots:
                if saved.read or counted:
                    # if nobody reads the saved tensor, the value stays on the tape, which is freed with the graph
                    held[saved.value].append(released.get(saved.id, end_of_step) if saved.read else last_release)
            for value_id in (*made, *replayed.casts):
                self.copies[value_id] = _Copy(
                    size_bytes=trace.values[value_id].size_bytes, readers=set(),
                    until=max(held.get(value_id, ()), default=None),
                )  # fmt: skip
            for ordinal in running:
                op = self.ops_of[replayed.frame][ordinal]
                for value_id in op.inputs:
                    if value_id in replayed.casts or (
                        value_id in made
                        and op.id != trace.values[value_id].producer
                        and self._reads_copy(replayed, ordinal, value_id)
                    ):
                        self.copies[value_id].readers.add(op.id)
            for value_id in replayed.fetched:
                holders = held.get(value_id, [])
                ops = {self.ops_of[replayed.frame][ordinal] for ordinal in running}
                readers = {op.id for op in ops if value_id in op.inputs}
                if not readers and not holders and value_id in replayed.parked:
                    holders = [last_release]  # nobody asks for it, but it may be on its way with the others
                self.brought[replayed.frame, value_id] = _Copy(
                    size_bytes=trace.values[value_id].size_bytes, readers=readers, until=max(holders, default=None)
                )
        self.ends = ends
        after: dict[int, list[int]] = {}
        for value_id, (end, before) in enumerate(zip(ends, index.ends, strict=True)):
            if end != before and trace.values[value_id].producer is not None:
                for event in (before, end):
                    after.setdefault(event, [*index.gone.get(event, ())])
                after[before].remove(value_id)
                after[end].append(value_id)
        for values in after.values():
            values.sort()
        return after

    def _openings(self) -> Iterator[int]:
        """The events before which backward takes something from off the device."""
        for replayed in self.replays.values():
            yield from (event for event, value_id in replayed.fetches if value_id in replayed.parked)
            ops_of = self.ops_of[replayed.frame]
            read = {event: {v for op in ops for v in ops_of[op].inputs} for event, ops in replayed.batches}
            yield from (event for event, values in read.items() if not replayed.parked.isdisjoint(values))

    # -- the walk

    def whole(self) -> tuple[Timeline, _Blocks]:
        """The timeline, and what an allocator sees."""
        return self.timeline(), self.blocks

    def timeline(self) -> Timeline:
        trace, index = self.trace, self.index
        self.after = self._lives()
        self.runs_at: dict[int, list[tuple[Replayed, tuple[int, ...]]]] = defaultdict(list)
        self.wanted: dict[int, list[tuple[int, int]]] = defaultdict(list)
        self.cast_for: dict[int, list[int]] = defaultdict(list)
        for replayed in self.replays.values():
            for event_index, ops in replayed.batches:
                self.runs_at[event_index].append((replayed, ops))
            for event_index, value_id in replayed.fetches:
                self.wanted[event_index].append((replayed.frame, value_id))
            for saved, _ in replayed.slots:
                if saved.value in replayed.casts and saved.id in index.first_load:
                    self.cast_for[index.first_load[saved.id]].append(saved.value)
        self.letting_go: dict[int, list[_Copy]] = defaultdict(list)
        for copy in (*self.copies.values(), *self.brought.values()):
            if copy.until is not None:
                self.letting_go[copy.until].append(copy)
        # a list by place: this is the innermost loop of the planner and of the searches, and a list is fast
        self.level = [int(trace.static_bytes.get(c.value, 0)) if c in STATIC else 0 for c in Category]
        self.total = sum(self.level)
        self.totals, self.labels = list[int](), list[str]()
        self.rows: list[tuple[int, ...]] = []
        self.seconds, self.flops, self.fetched_bytes = 0.0, 0, 0
        # events at which nothing is but what the recorded step has are most of all
        ends = {self.ends[value_id] for value_id, readers in self.tape_readers.items() if readers}
        changed = {*self.wanted, *self.runs_at, *self.cast_for, *self.after, *self.letting_go, *self.tapes_end, *ends}
        changed |= {index.enters[frame] for frame in self.replays} | {index.exits[frame] for frame in self.replays}
        for at, (alloc, op, gone) in enumerate(index.happens):
            if at in changed:
                self._change(at)
                continue
            if alloc is not None:
                self._add_value(alloc, index.sizes[alloc])
            elif op is not None:
                self.at = at
                self._mark(index.labels[op], index.scratch_bytes[op])
            for value_id in gone:
                self._add_value(value_id, -index.sizes[value_id])
        totals = self.totals
        columns = zip(*self.rows, strict=True) if self.rows else ((),) * len(Category)
        peak = max(range(len(totals)), key=totals.__getitem__) if totals else 0
        return Timeline(
            labels=tuple(self.labels),
            live_bytes=tuple(totals),
            by_category={c.value: tuple(column) for c, column in zip(Category, columns, strict=True)},
            peak_bytes=totals[peak] if totals else self.total,
            peak_event=peak,
            peak_owner=self.labels[peak] if totals else "nothing",
            recompute_seconds=self.seconds,
            recompute_flops=self.flops,
            replays=sum(bool(replayed.batches) for replayed in self.replays.values()),
            offloaded_bytes=sum(trace.values[v].size_bytes for r in self.replays.values() for v in r.parked),
            fetched_bytes=self.fetched_bytes,
        )

    def _change(self, at: int) -> None:
        """Walk through an event at which the plan may change something."""
        trace, index, self.at = self.trace, self.index, at
        event, what, state_bytes = trace.events[at], trace.events[at].what, trace.random_state_bytes
        for frame, value_id in self.wanted.get(at, ()):
            self._bring(frame, value_id)
        for replayed, ops in self.runs_at.get(at, ()):
            self._run_again(replayed, ops, at)
        for value_id in self.cast_for.get(at, ()):
            self._cast_again(value_id, at)
        if what is EventKind.ALLOC:
            self._add_value(event.subject, trace.values[event.subject].size_bytes)
        elif what is EventKind.OP:
            self._mark(index.labels[event.subject], trace.ops[event.subject].scratch_bytes)
        elif what is EventKind.ENTER and event.subject in self.replays:
            self._add(_SAVED, self.replays[event.subject].states_in_forward * state_bytes)
        elif what is EventKind.EXIT and event.subject in self.replays:
            replayed = self.replays[event.subject]
            self._add(_SAVED, (len(replayed.recipe.states) - replayed.states_in_forward) * state_bytes)
        for value_id in self.after[at] if at in self.after else index.gone.get(at, ()):
            if not self.tape_readers.get(value_id):
                self._add_value(value_id, -trace.values[value_id].size_bytes)
        for copy in self.letting_go.get(at, ()):
            self._drop_copy(copy, at)
        if at in self.tapes_end:
            self._add(_SAVED, -self.tapes_end[at] * state_bytes)

    def _reads_copy(self, replayed: Replayed, ordinal: int, value_id: int) -> bool:
        """Does the op read the copy of a value of its own frame that was made again?"""
        value = self.trace.values[value_id].ordinal
        assert value is not None
        return reads_copy(self.trace.programs[replayed.frame].steps[ordinal], replayed.recipe, value)

    def _drop_copy(self, copy: _Copy, index: int) -> None:
        """Free `copy` if neither autograd nor the tape needs it after event `index`."""
        if copy.is_live and not copy.readers and (copy.until is None or copy.until <= index):
            self._add(_SAVED, -copy.size_bytes, ("copy", id(copy)))
            copy.is_live = False

    def _run_again(self, replayed: Replayed, ops: tuple[int, ...], index: int) -> None:
        """Walk through the ops that run again before event `index`."""
        trace = self.trace
        state_bytes = trace.random_state_bytes
        for ordinal in ops:
            op = self.ops_of[replayed.frame][ordinal]
            for value_id in replayed.fetched.intersection(op.inputs):
                self._bring(replayed.frame, value_id)
            for value_id in replayed.casts.intersection(op.inputs):
                self._cast_again(value_id, index)
            made = [self.copies[v] for v in self.index.made_of[replayed.frame][ordinal]]
            for copy in made:
                self._add(_SAVED, copy.size_bytes, ("copy", id(copy)))
                copy.is_live = True
            draws = ordinal in replayed.recipe.states
            self._add(_TEMPORARIES, state_bytes if draws else 0)  # the state to go back to
            self._mark(f"replay of {op.unit}: {op.name}", op.rerun_scratch_bytes)
            self._add(_TEMPORARIES, -state_bytes if draws else 0)
            self._add(_SAVED, -state_bytes if draws else 0)
            self.seconds += op.seconds
            self.flops += op.flops
            for value_id in dict.fromkeys(op.inputs):
                if value_id in replayed.fetched:
                    copy = self.brought[replayed.frame, value_id]
                    copy.readers.discard(op.id)
                    self._drop_copy(copy, index - 1)
                elif value_id in self.copies and op.id in self.copies[value_id].readers:
                    copy = self.copies[value_id]
                    copy.readers.discard(op.id)
                    self._drop_copy(copy, index - 1)
                elif op.id in self.tape_readers.get(value_id, ()):
                    readers = self.tape_readers[value_id]
                    readers.discard(op.id)
                    if not readers and self.ends[value_id] < index and trace.values[value_id].producer is not None:
                        self._add_value(value_id, -trace.values[value_id].size_bytes)
            for copy in made:
                self._drop_copy(copy, index - 1)

    def _cast_again(self, value_id: int, index: int) -> None:
        """Make sure that autocast's copy of a weight is there before event `index`."""
        copy = self.copies[value_id]
        if copy.is_live or self.ends[value_id] >= index:
            return
        self._add(_SAVED, copy.size_bytes, ("copy", id(copy)))
        copy.is_live = True
        self._cast(value_id)

    def _cast(self, value_id: int) -> None:
        """Walk through the cast of a weight, whose result is live."""
        producer = self.trace.values[value_id].producer
        assert producer is not None
        op = self.trace.ops[producer]
        self._mark(f"replay of {op.unit}: {op.name}", op.rerun_scratch_bytes)
        self.seconds += op.seconds

    # -- sweeps

    def _bring(self, frame: int, value_id: int) -> None:
        """Make sure that a value is there which `frame` is about to read in backward: fetch it, or make it again by a
        sweep."""
        copy = self.brought[frame, value_id]
        self._open(frame, value_id)
        if copy.is_live:
            return
        if value_id in self.replays[frame].parked:
            self._unpack(copy)
            copy.is_live = True
            return
        way: list[tuple[int, int]] = []
        base, link = self._previous(value_id)
        while link is not None and not self.brought[link].is_live:
            way.append(link)
            base, link = self._previous(link[1])
        units = [self.trace.frames[each].unit for each, _ in way]
        stays = self.stores.get((self.trace.frames[base].unit, self.trace.frames[frame].unit), frozenset(units))
        for each, unit in zip(way, units, strict=True):
            self.brought[each].stays = unit in stays
        self._produce(value_id, copy)
        copy.is_live = True

    def _open(self, frame: int, value_id: int) -> None:
        """Backward takes something that `frame` lacks."""
        for before in self.shipments.fetched_with(frame) if value_id in self.replays[frame].parked else ():
            for copy in (self.brought[before, each] for each in self.replays[before].parked):
                if not copy.is_live:
                    self._unpack(copy)
                    copy.is_live = True

    def _unpack(self, copy: _Copy) -> None:
        """Walk through the copy of an offloaded value back to the device."""
        self._add(_SAVED, copy.size_bytes, ("copy", id(copy)))
        self._mark("fetch of what was offloaded", 0)
        self.fetched_bytes += copy.size_bytes

    def _previous(self, value_id: int) -> tuple[int, tuple[int, int] | None]:
        """The frame that made a value; and the input that this frame itself lacks, as (frame, value), or None."""
        frame = self._frame_of(value_id)
        swept = self.replays[frame].fetched - self.replays[frame].parked
        link = next((v for v in self.trace.frames[frame].inputs if v in swept), None)
        return frame, None if link is None else (frame, link)

    def _frame_of(self, value_id: int) -> int:
        producer = self.trace.values[value_id].producer
        assert producer is not None
        frame = self.trace.ops[producer].frame
        assert frame is not None
        return frame

    def _produce(self, value_id: int, result: _Copy) -> None:
        """Walk through making a value again for another unit. Afterwards `result` is live, and the values that led to
        it are not."""
        trace = self.trace
        frame = self._frame_of(value_id)
        replayed = self.replays[frame]
        ordinal = trace.values[value_id].ordinal
        assert ordinal is not None
        order = leading_to(trace.programs[frame], replayed.recipe, ordinal)
        left: dict[int, set[int]] = defaultdict(set)
        for step in order:
            op = self.ops_of[frame][step]
            for each in op.inputs:
                if each != value_id and trace.values[each].producer != op.id:
                    left[each].add(op.id)
        passing: dict[int, Hashable] = {}  # what is alive only for this, with its block
        for step in order:
            op = self.ops_of[frame][step]
            for each in replayed.fetched.intersection(op.inputs):
                copy = self.brought[frame, each]
                self._open(frame, each)
                if each in passing or copy.is_live:
                    continue
                if each in replayed.parked:  # it is asked for once more by its own backward, and copied again
                    self._unpack(copy)
                else:
                    self._produce(each, copy)
                if copy.stays:
                    copy.is_live = True
                else:
                    passing[each] = ("copy", id(copy))
            # each op of a sweep has copies of its own, where the frame's backward has none yet
            casts = [v for v in replayed.casts.intersection(op.inputs) if not self.copies[v].is_live]
            casts = [v for v in casts if self.ends[v] < self.at]
            for each in casts:
                self._add(_SAVED, trace.values[each].size_bytes, ("passing", each))
                self._cast(each)
            for each in self.index.made_of[frame][step]:
                block = ("copy", id(result)) if each == value_id else ("passing", each)
                self._add(_SAVED, trace.values[each].size_bytes, block)
                if each != value_id:
                    passing[each] = block
            draws = trace.random_state_bytes if step in replayed.recipe.states else 0
            self._add(_TEMPORARIES, draws)  # the state to go back to
            self._mark(f"sweep through {op.unit}: {op.name}", op.rerun_scratch_bytes)
            self._add(_TEMPORARIES, -draws)
            for each in casts:
                self._add(_SAVED, -trace.values[each].size_bytes, ("passing", each))
            self.seconds += op.seconds
            self.flops += op.flops
            for each in [*dict.fromkeys(op.inputs), *self.index.made_of[frame][step]]:
                left[each].discard(op.id)
                if each in passing and not left[each]:
                    self._add(_SAVED, -trace.values[each].size_bytes, passing.pop(each))

    # -- rows

    def _add_value(self, value_id: int, size_bytes: int) -> None:
        """The bytes of a recorded value come, or go."""
        if size_bytes:
            self.level[self.index.places[value_id]] += size_bytes
            self.total += size_bytes
            self.blocks.append((("value", value_id), size_bytes))

    def _add(self, place: int, size_bytes: int, block: Hashable = None) -> None:
        """Bytes come, or go, that are counted at `place`."""
        self.level[place] += size_bytes
        self.total += size_bytes
        if block is not None and size_bytes:
            self.blocks.append((block, size_bytes))

    def _mark(self, label: str, scratch_bytes: int) -> None:
        self.labels.append(label)
        if not scratch_bytes:
            self.totals.append(self.total)
            self.rows.append(tuple(self.level))
            return
        self.totals.append(self.total + scratch_bytes)
        self.blocks += [(("scratch",), scratch_bytes), (("scratch",), -scratch_bytes)]
        self.level[_TEMPORARIES] += scratch_bytes
        self.rows.append(tuple(self.level))
        self.level[_TEMPORARIES] -= scratch_bytes
