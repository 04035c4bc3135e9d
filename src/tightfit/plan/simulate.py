"""Referee of plans: what a step does to memory under a plan, from the trace alone.

Idea: every storage lives from its making until the last of its holders lets go. Python holds it up to its
natural end; each saved tensor holds it up to its release. A plan takes away some of these holders (dropped
saved tensors), adds others (stored values and unit inputs, until the replay is done) and inserts each unit's
replay before the first backward read of something dropped. Walking the events in order and adding up gives the
live bytes after each.

Invariant: written without the planner's model; with `plan=None` the result is the recorded step itself.
Refused: a plan that was made from another trace (`PlanMismatch`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from tightfit.core import (
    Category,
    Choice,
    Happening,
    InvalidInput,
    Op,
    Phase,
    Plan,
    PlanMismatch,
    Timeline,
    Trace,
)
from tightfit.plan.program import Recipe, first_random, kept_values, recipe

_STATIC = (Category.PARAMETERS, Category.GRADIENTS, Category.OPTIMIZER_STATE, Category.BUFFERS, Category.INPUTS)


def simulate(trace: Trace, plan: Plan | None = None) -> Timeline:
    """Live bytes through the step of `trace` under `plan` (`None`: no checkpointing).

    The timeline has one entry per allocation, op and release, in order, replays included. Raises
    `PlanMismatch` when the plan belongs to another trace.
    """
    if plan is not None and plan.trace_digest != trace.digest:
        raise PlanMismatch(
            f"the plan was made from trace {plan.trace_digest}, this is trace {trace.digest}; make the plan anew"
        )
    return simulate_choices(trace, () if plan is None else plan.choices)


def simulate_choices(trace: Trace, choices: tuple[Choice, ...]) -> Timeline:
    """`simulate` before there is a `Plan`."""
    return _Walk(trace, {choice.unit: choice for choice in choices}).timeline()


@dataclass
class _Replayed:
    """One frame that will be replayed."""

    frame: int
    recipe: Recipe
    first_load: int  # event before which the replay happens
    extra_states: int  # saved generator states


class _Walk:
    def __init__(self, trace: Trace, choices: dict[str, Choice]) -> None:
        self.trace = trace
        self.ops_of: dict[int, list[Op]] = defaultdict(list)
        for op in trace.ops:
            if op.frame is not None and op.ordinal is not None:
                self.ops_of[op.frame].append(op)
        self.values_of: dict[int, dict[int, int]] = {frame.id: {} for frame in trace.frames}
        for value in trace.values:
            if value.producer is not None and value.ordinal is not None:
                frame_id = trace.ops[value.producer].frame
                assert frame_id is not None
                self.values_of[frame_id][value.ordinal] = value.id
        self.op_event = {e.subject: i for i, e in enumerate(trace.events) if e.what is Happening.OP}
        self.replays = self._replays(choices)

    # -- which frames replay, and when

    def _replays(self, choices: dict[str, Choice]) -> dict[int, _Replayed]:
        trace = self.trace
        load_event: dict[int, int] = {}
        for index, event in enumerate(trace.events):
            if event.what is Happening.LOAD:
                load_event.setdefault(event.subject, index)
        found = {}
        slots: dict[int, list[int]] = defaultdict(list)
        for saved in trace.saved:
            if saved.frame is not None:
                slots[saved.frame].append(saved.id)
        for frame in trace.frames:
            choice = choices.get(frame.unit)
            if choice is None:
                continue
            program = trace.programs[frame.id]
            planned = trace.programs[next(f.id for f in trace.frames if f.unit == frame.unit)]
            if program.slots != planned.slots or [s.name for s in program.steps] != [s.name for s in planned.steps]:
                chosen = recipe(program, frozenset())  # the engine's answer to another op sequence
            else:
                if len(choice.actions) != program.values:
                    raise InvalidInput(
                        f"the choice for {frame.unit!r} has {len(choice.actions)} actions, not {program.values}"
                    )
                chosen = recipe(program, kept_values(choice.actions))
            dropped_loads = [
                load_event[s] for s, drop in zip(slots[frame.id], chosen.drop, strict=True) if drop and s in load_event
            ]
            if not dropped_loads:
                continue
            first = first_random(program)
            states = chosen.states | ({first} if first is not None else set())
            found[frame.id] = _Replayed(
                frame=frame.id, recipe=chosen, first_load=min(dropped_loads),
                extra_states=len(states),
            )  # fmt: skip
        return found

    # -- lives

    def _lives(self) -> dict[int, list[int]]:
        """Values to free after each event; a value in none of them lives to the end of the step."""
        trace = self.trace
        freed = {e.subject: i for i, e in enumerate(trace.events) if e.what is Happening.FREE}
        released = {e.subject: i for i, e in enumerate(trace.events) if e.what is Happening.RELEASE}
        end_of_step = len(trace.events)
        kept_until: dict[int, int] = {}  # by the saved tensors that the plan still holds
        dropped: set[int] = set()
        for saved in trace.saved:
            replayed = self.replays.get(saved.frame) if saved.frame is not None else None
            if replayed is not None and saved.ordinal is not None and replayed.recipe.drop[saved.ordinal]:
                dropped.add(saved.value)
            else:
                kept_until[saved.value] = max(kept_until.get(saved.value, -1), released.get(saved.id, end_of_step))
        ends: dict[int, int] = {}
        for value in trace.values:
            end = freed.get(value.id, end_of_step)
            if value.id in dropped:
                natural = end if value.natural_end is None else value.natural_end
                end = max(natural, kept_until.get(value.id, -1))
            ends[value.id] = end
        for replayed in self.replays.values():
            stored = (self.values_of[replayed.frame][ordinal] for ordinal in replayed.recipe.captured)
            for value_id in (*stored, *trace.frames[replayed.frame].inputs):
                ends[value_id] = max(ends[value_id], replayed.first_load)
        after: dict[int, list[int]] = defaultdict(list)
        for value_id, end in ends.items():
            if trace.values[value_id].producer is not None:
                after[end].append(value_id)
        self.freed = freed
        return after

    # -- the walk

    def timeline(self) -> Timeline:
        trace = self.trace
        after = self._lives()
        by_event: dict[int, list[_Replayed]] = defaultdict(list)
        for replayed in self.replays.values():
            by_event[replayed.first_load].append(replayed)
        self.level = {category: int(trace.static_bytes.get(category.value, 0)) for category in _STATIC}
        self.level[Category.SAVED] = self.level[Category.TEMPORARIES] = 0
        self.labels: list[str] = []
        self.rows: list[dict[Category, int]] = []
        self.seconds = 0.0
        self.flops = 0
        replayed_free: dict[int, list[int]] = defaultdict(list)  # event -> sizes of replayed values to free
        for index, event in enumerate(trace.events):
            for replayed in by_event.get(index, ()):
                for value, end in self._replay(replayed):
                    replayed_free[end].append(value)
            if event.what is Happening.ALLOC:
                self._add(self._category(event.subject), trace.values[event.subject].size_bytes)
            elif event.what is Happening.OP:
                op = trace.ops[event.subject]
                self._mark(self._label(op), op.scratch_bytes)
            elif event.what is Happening.ENTER and event.subject in self.replays:
                self._add(Category.SAVED, self.replays[event.subject].extra_states * trace.random_state_bytes)
            for value_id in after.get(index, ()):
                self._add(self._category(value_id), -trace.values[value_id].size_bytes)
            for value_id in replayed_free.get(index, ()):
                self._add(Category.SAVED, -trace.values[value_id].size_bytes)
        totals = [sum(row.values()) for row in self.rows]
        peak = max(range(len(totals)), key=totals.__getitem__) if totals else 0
        return Timeline(
            labels=tuple(self.labels),
            live_bytes=tuple(totals),
            by_category={c.value: tuple(row[c] for row in self.rows) for c in Category},
            peak_bytes=totals[peak] if totals else sum(self.level.values()),
            peak_event=peak,
            peak_owner=self.labels[peak] if totals else "nothing",
            recompute_seconds=self.seconds,
            recompute_flops=self.flops,
            replays=len(self.replays),
        )

    def _replay(self, replayed: _Replayed) -> Iterator[tuple[int, int]]:
        """Walk one replay; yields (value, event after which it is freed) for what stays behind in slots."""
        trace, chosen = self.trace, replayed.recipe
        states = trace.random_state_bytes if replayed.extra_states else 0
        self._add(Category.TEMPORARIES, states)  # the state to go back to
        transient: dict[int, int] = {}  # value -> event of its natural end
        last = max(chosen.runs, default=-1)  # the replay stops once the last slot is filled
        for op in self.ops_of[replayed.frame]:
            assert op.ordinal is not None
            if op.ordinal > last:
                break
            if op.ordinal in chosen.runs:
                for value_id in op.outputs:
                    if value_id is None or trace.values[value_id].producer != op.id:
                        continue
                    value = trace.values[value_id]
                    self._add(Category.SAVED, value.size_bytes)
                    if value.ordinal in chosen.dropped:
                        yield value_id, self.freed.get(value_id, len(trace.events))
                    else:
                        transient[value_id] = len(trace.events) if value.natural_end is None else value.natural_end
                self._mark(f"replay of {op.unit}: {op.name}", op.scratch_bytes)
                self.seconds += op.seconds
                self.flops += op.flops
            for value_id in [v for v, end in transient.items() if end <= self.op_event[op.id]]:
                self._add(Category.SAVED, -trace.values[value_id].size_bytes)
                del transient[value_id]
        for value_id in transient:
            self._add(Category.SAVED, -trace.values[value_id].size_bytes)
        self._add(Category.TEMPORARIES, -states)
        self._add(Category.SAVED, -replayed.extra_states * trace.random_state_bytes)

    # -- rows

    def _category(self, value_id: int) -> Category:
        value = self.trace.values[value_id]
        if value.category is Category.GRADIENTS:
            return Category.GRADIENTS
        return Category.SAVED if value.needed and self._is_forward(value.producer) else Category.TEMPORARIES

    def _is_forward(self, op: int | None) -> bool:
        return op is not None and self.trace.ops[op].phase is Phase.FORWARD

    def _label(self, op: Op) -> str:
        where = op.unit or ("outside the units" if op.phase is not Phase.OPTIMIZER else "the optimizer")
        return (
            f"{op.phase.value} of {where}: {op.name}"
            if op.phase is not Phase.OPTIMIZER
            else f"optimizer step: {op.name}"
        )

    def _add(self, category: Category, size_bytes: int) -> None:
        self.level[category] += size_bytes

    def _mark(self, label: str, scratch_bytes: int) -> None:
        row = dict(self.level)
        row[Category.TEMPORARIES] += scratch_bytes
        self.labels.append(label)
        self.rows.append(row)
