"""The live bytes of a step at any moment, as a sum over what its units keep and run again.

Idea: a choice says of every value whether it is kept, and of every cluster of ops whether it runs again. Before each
read of backward, some clusters have run and others will. A value's bytes are there at a moment if one of its holders
holds it then: Python, a saved tensor that is not dropped, or an op that will read it again. Each holder is a sum of
such yes-or-no columns. One more column for each set of holders says that any of them holds.

Invariant: the sum counts no byte that the referee (`plan.simulate`) would not count, so a program that keeps it below a
budget loses no choice that fits. It counts every byte, but for copies of weights that autocast makes and for values
that in-place ops change between two reads. Nothing of the referee is used here.
Refused: sweeps (nested recompute) and values off the device.
"""

from __future__ import annotations

import bisect
import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tightfit.core import EventKind, Kind, Program, Trace
from tightfit.plan.indexed import indexed
from tightfit.plan.program import cluster_of, clusters, demands, first_random, rerunnable


@dataclass(frozen=True, slots=True)
class Moment:
    """When an op runs: one of the step itself, or the one with an ordinal in `frame` that runs again before `event`."""

    event: int
    frame: int | None = None
    ordinal: int = -1


@dataclass(frozen=True, slots=True)
class Linear:
    """A number and columns, each with a coefficient, in the order of the columns."""

    constant: float = 0.0
    columns: tuple[tuple[int, float], ...] = ()

    def __add__(self, other: Linear) -> Linear:
        return total((self, 1.0), (other, 1.0))

    def __sub__(self, other: Linear) -> Linear:
        return total((self, 1.0), (other, -1.0))


NOTHING, ONE = Linear(), Linear(1.0)


def total(*parts: tuple[Linear, float]) -> Linear:
    """The sum of the parts, each times its factor."""
    constant, columns = 0.0, defaultdict[int, float](float)
    for part, factor in parts:
        constant += part.constant * factor
        for column, coefficient in part.columns:
            columns[column] += coefficient * factor
    return Linear(constant, tuple(sorted(each for each in columns.items() if each[1])))


@functools.lru_cache(maxsize=4096)
def _cluster_of_op(program: Program) -> tuple[int | None, ...]:
    """Of each op the cluster with which it may run again; None: it must not."""
    found: list[int | None] = [None] * len(program.steps)
    for cluster, ops in enumerate(clusters(program)):
        for op in ops if rerunnable(program)[cluster] else ():
            found[op] = cluster
    return tuple(found)


@dataclass(slots=True, kw_only=True)
class _Call:
    """One frame of a unit that can be planned."""

    unit: str
    frame: int
    program: Program  # of the unit
    loads: tuple[tuple[int, int], ...]  # (event at which backward first reads it, value ordinal), in order
    last_release: int
    first: int  # column of the first cluster at the first load
    is_alone: bool  # no other call of the unit is there

    def ran(self, cluster: int, load: int) -> Linear:
        """Has the cluster run again by this load? Before the first load none has."""
        width = len(clusters(self.program))
        return NOTHING if load < 0 else Linear(0.0, ((self.first + load * width + cluster, 1.0),))

    def loads_before(self, event: int, *, itself: bool) -> int:
        """How many loads there are before an event, or up to it with the event `itself`."""
        return bisect.bisect_left(self.loads, (event + itself,))


class LiveBytes:
    """The columns of a step, and its live bytes over them. The bytes of moments that were asked for are kept.

    One thing because holders, copies and generator states are told over the same columns.
    """

    def __init__(self, trace: Trace, programs: dict[str, Program]) -> None:
        self.trace, self.index = trace, indexed(trace)
        self.costs: list[float] = []  # seconds, by column
        self.paid: set[int] = set()  # columns that say that a cluster runs again, at its seconds
        self.upper: list[float] = []
        self.keeps: dict[tuple[str, int], Linear] = {}  # by unit and value ordinal
        self.reruns: dict[tuple[str, int], Linear] = {}  # by unit and cluster
        self.rows: list[Linear] = []  # between what is kept and what runs again; none is above zero
        self.calls: dict[int, _Call] = {}  # by frame
        self.rows_of: dict[int, list[Linear]] = {}  # of a column that says "any of these": none is above zero
        self._any_of: dict[tuple[Linear, ...], Linear] = {}
        self._held: dict[tuple[int, int], Linear] = {}  # by value and place among its changes
        self._seen: dict[Moment, Linear] = {}
        self._index()
        for path, program in programs.items():
            self._add_unit(path, program, [frame.id for frame in trace.frames if frame.unit == path])

    def _index(self) -> None:
        trace, index = self.trace, self.index
        made_at = {e.subject: i for i, e in enumerate(trace.events) if e.what is EventKind.ALLOC}
        self.enter = {e.subject: i for i, e in enumerate(trace.events) if e.what is EventKind.ENTER}
        self.readers: dict[int, list[tuple[int, int]]] = defaultdict(list)  # value -> (frame, op ordinal)
        for frame in trace.frames:
            for ordinal, op in enumerate(index.ops_of[frame.id]):
                for value_id in dict.fromkeys(op.inputs):
                    self.readers[value_id].append((frame.id, ordinal))
        ends = index.ends
        known = [v for v in trace.values if v.producer is not None and v.size_bytes and v.id in made_at]
        self.value_ids = np.array([v.id for v in known], dtype=np.int64)
        self.sizes = np.array([v.size_bytes for v in known], dtype=np.float64)
        self.starts = np.array([made_at[v.id] for v in known], dtype=np.int64)
        naturals = [ends[v.id] if v.natural_end is None else v.natural_end for v in known]
        self.naturals = np.array(naturals, dtype=np.int64)  # until then they are there, whatever is chosen
        loads = {
            frame.id: [index.first_load[s.id] for s in index.slots_of[frame.id] if s.id in index.first_load]
            for frame in trace.frames
        }
        lasts = [max([ends[v.id], *(max(loads[f], default=-1) for f, _ in self.readers[v.id])]) for v in known]
        self.lasts = np.array(lasts, dtype=np.int64)  # after that nothing can hold them
        #: The events before which what holds a value changes, in order.
        self.changes = {
            v.id: sorted(
                {index.released[s.id] + 1 for s in index.saved_of.get(v.id, ()) if s.id in index.released}
                | {event + late for f, _ in self.readers[v.id] for event in loads[f] for late in (0, 1)}
            )
            for v in known
        }

    # -- columns, and the rows between them

    def _column(self, seconds: float | None = None, upper: float = 1.0) -> Linear:
        """A new column. `seconds`: of the cluster whose running again is counted there; None: nothing is."""
        column = len(self.costs)
        self.costs.append(seconds or 0.0)
        self.upper.append(upper)
        if seconds is not None:
            self.paid.add(column)
        return Linear(0.0, ((column, 1.0),))

    def _add_unit(self, path: str, program: Program, frames: list[int]) -> None:
        groups, owner, may_run = clusters(program), cluster_of(program), rerunnable(program)
        for value in range(program.values):
            fixed = owner[value] is None or value in program.held
            self.keeps[path, value] = ONE if fixed else self._column()
        alone = len(frames) == 1  # then whatever runs again is asked for by this call
        for cluster, ops in enumerate(groups):
            seconds = sum(self.index.ops_of[frames[0]][op].seconds for op in ops) if alone else None
            self.reruns[path, cluster] = self._column(seconds, float(may_run[cluster]))

        def again(cluster: int) -> Linear:
            return self.reruns[path, cluster]

        there = (self._there(path, program, value, again) for value in program.needed)
        self.rows += [ONE - each for each in there if each != ONE]
        for cluster in range(len(groups)):
            self.rows += self._demanded(path, program, cluster, again)
        for frame in frames:
            self.calls[frame] = self._call(path, program, frame, alone)
        if not alone:
            for cluster in range(len(groups)):
                asked = [self.calls[f].ran(cluster, len(self.calls[f].loads) - 1) for f in frames]
                self.rows.append(total((self.reruns[path, cluster], 1.0), *((each, -1.0) for each in asked)))

    def _there(
        self, path: str, program: Program, value: int, ran: Callable[[int], Linear], *, early: bool = False
    ) -> Linear:
        """Is a value kept, or made again, as `ran` says of its cluster? `early`: an earlier state, never kept."""
        maker = cluster_of(program)[value]
        if maker is None or (value in program.held and not early):
            return ONE
        return ran(maker) if early else self.keeps[path, value] + ran(maker)

    def _demanded(self, path: str, program: Program, cluster: int, ran: Callable[[int], Linear]) -> Iterator[Linear]:
        """The rows that say that what a cluster reads is there when it runs."""
        final, early = demands(program)[cluster]
        for values, is_early in ((final, False), (early, True)):
            for value in values:
                there = self._there(path, program, value, ran, early=is_early)
                if there != ONE:
                    yield ran(cluster) - there

    def _call(self, path: str, program: Program, frame: int, alone: bool) -> _Call:
        own, owner, index = self.trace.programs[frame], cluster_of(program), self.index
        firsts: dict[int, int] = {}
        for saved in index.slots_of[frame]:
            value = -1 if saved.ordinal is None else own.slots[saved.ordinal]
            if value >= 0 and owner[value] is not None and saved.id in index.first_load:
                firsts[value] = min(firsts.get(value, len(self.trace.events)), index.first_load[saved.id])
        loads = tuple(sorted((event, value) for value, event in firsts.items()))
        first = len(self.costs)
        for load in range(len(loads)):
            for cluster, ops in enumerate(clusters(program)):
                counts = load == len(loads) - 1 and not alone
                seconds = sum(index.ops_of[frame][op].seconds for op in ops) if counts else None
                self._column(seconds, float(rerunnable(program)[cluster]))
        released = [index.released.get(s.id, len(self.trace.events)) for s in index.slots_of[frame]]
        return _Call(
            unit=path, frame=frame, program=program, loads=loads, last_release=max(released, default=-1), first=first,
            is_alone=alone,
        )  # fmt: skip

    def _between(self, call: _Call, loads: Sequence[int]) -> list[Linear]:
        """The rows that say what has run at each of `loads`, of which the last is the call's last."""
        program, path = call.program, call.unit
        owner, demanded = cluster_of(program), demands(program)
        joined = {c for c, (_, early) in enumerate(demanded) if any(owner[v] is not None for v in early)}
        joined |= {owner[v] for _, early in demanded for v in early}  # type: ignore[misc] # None is no cluster
        asking: dict[int, list[int]] = defaultdict(list)  # cluster -> clusters that read what it makes
        for cluster, (final, _) in enumerate(demanded):
            for maker in dict.fromkeys(owner[v] for v in final):
                if maker is not None and maker != cluster:
                    asking[maker].append(cluster)
        rows = []
        for before, load in zip((-1, *loads), loads, strict=False):
            read = [value for _, value in call.loads[before + 1 : load + 1] if value not in program.held]
            by_now = functools.partial(call.ran, load=load)
            rows += [ONE - self._there(path, program, value, by_now) for value in read]
            for cluster in range(len(demanded)):
                now, earlier = call.ran(cluster, load), call.ran(cluster, before)
                if earlier.columns:
                    rows.append(earlier - now)
                rows.append(now - self.reruns[path, cluster])
                rows += self._demanded(path, program, cluster, by_now)
                if cluster in joined:
                    continue
                # nothing runs before something asks for it
                parts = [(now, 1.0), (earlier, -1.0)]
                for value in read:
                    if owner[value] == cluster:
                        parts += [(ONE, -1.0), (self.keeps[path, value], 1.0)]
                for other in asking[cluster]:
                    parts += [(call.ran(other, load), -1.0), (call.ran(other, before), 1.0)]
                rows.append(total(*parts))
        if call.is_alone:
            rows += [self.reruns[path, cluster] - call.ran(cluster, loads[-1]) for cluster in range(len(demanded))]
        return rows

    def rows_for(self, levels: Iterable[Linear]) -> list[Linear]:
        """The rows that say what the columns of `levels` mean. None is above zero.

        Of a call only the loads at which the levels look into it have rows: at the others it does not matter when what
        runs by the next has run.
        """
        rows = [*self.rows]
        known: set[int] = set()
        pending = [column for level in levels for column, _ in level.columns]
        while pending:
            column = pending.pop()
            if column not in known:
                known.add(column)
                more = self.rows_of.get(column, ())
                rows += more
                pending += [each for row in more for each, _ in row.columns]
        columns = sorted(known)
        for call in self.calls.values():
            width = len(clusters(call.program))
            start = bisect.bisect_left(columns, call.first)
            stop = bisect.bisect_left(columns, call.first + width * len(call.loads))
            if call.loads and (start < stop or not call.is_alone):
                looked = {(column - call.first) // width for column in columns[start:stop]}
                rows += self._between(call, sorted({*looked, len(call.loads) - 1}))
        return rows

    # -- what has run at a moment

    def _state(self, call: _Call, ordinal: int, moment: Moment, *, done: bool) -> Linear:
        """Has this op run again? `done`: entirely, or is it running at least?"""
        cluster = _cluster_of_op(call.program)[ordinal]
        if cluster is None:
            return NOTHING
        if moment.frame == call.frame:
            loads = call.loads_before(moment.event, itself=True)
            loads -= not (ordinal < moment.ordinal or (not done and ordinal == moment.ordinal))
        else:
            loads = call.loads_before(moment.event, itself=moment.frame is None)
        if loads == len(call.loads) and moment.frame != call.frame:
            return self._at_last(call, cluster)
        return call.ran(cluster, loads - 1)

    def _at_last(self, call: _Call, cluster: int) -> Linear:
        """Does the cluster run again in this call at all?"""
        if len(call.loads) == 0:
            return NOTHING
        return self.reruns[call.unit, cluster] if call.is_alone else call.ran(cluster, len(call.loads) - 1)

    def _will_read(self, frame: int, ordinal: int, moment: Moment) -> Linear:
        """Does this op run again, and has it not been done yet?"""
        call = self.calls.get(frame)
        cluster = None if call is None else _cluster_of_op(call.program)[ordinal]
        if call is None or cluster is None:
            return NOTHING
        return self._at_last(call, cluster) - self._state(call, ordinal, moment, done=True)

    def _running(self, call: _Call, ordinal: int, moment: Moment) -> Linear:
        return self._state(call, ordinal, moment, done=False) - self._state(call, ordinal, moment, done=True)

    # -- live bytes

    def at(self, moment: Moment) -> Linear:
        """The live bytes."""
        if moment not in self._seen:
            self._seen[moment] = self._at(moment)
        return self._seen[moment]

    def _at(self, moment: Moment) -> Linear:
        trace, event = self.trace, moment.event
        started = self.starts < event if moment.frame is not None else self.starts <= event
        always = started & (self.naturals >= event)
        parts = [(Linear(float(sum(trace.static_bytes.values())) + float(self.sizes[always].sum())), 1.0)]
        for place in np.nonzero(started & ~always & (self.lasts >= event))[0]:
            parts.append((self._original(int(self.value_ids[place]), moment), float(self.sizes[place])))
        for frame, call in self.calls.items():
            if call.loads and call.loads[0][0] <= event <= call.last_release:
                for ordinal, value_id in self.index.values_of[frame].items():
                    if size := trace.values[value_id].size_bytes:
                        parts.append((self._any(self._copy_holders(call, ordinal, value_id, moment)), float(size)))
        parts += self._states(moment)
        if moment.frame is None:
            parts.append((Linear(float(trace.ops[trace.events[event].subject].scratch_bytes)), 1.0))
        else:
            op = self.index.ops_of[moment.frame][moment.ordinal]
            running = self._running(self.calls[moment.frame], moment.ordinal, moment)
            parts.append((running, float(op.rerun_scratch_bytes)))
        return total(*parts)

    def _original(self, value_id: int, moment: Moment) -> Linear:
        """Is a value that the step made still there, after Python has let go of it?"""
        if moment.frame is not None and any(frame == moment.frame for frame, _ in self.readers[value_id]):
            return self._any(self._holders(value_id, moment))
        key = value_id, bisect.bisect_right(self.changes[value_id], moment.event)
        if key not in self._held:
            self._held[key] = self._any(self._holders(value_id, moment))
        return self._held[key]

    def _any(self, holders: Iterable[Linear]) -> Linear:
        """One if any of `holders` is one."""
        wanted = tuple(sorted(set(holders), key=lambda each: (each.constant, each.columns)))
        if ONE in wanted:
            return ONE
        wanted = tuple(each for each in wanted if each.columns)
        if not wanted:
            return NOTHING
        if len(wanted) == 1 and wanted[0].constant == 0 and len(wanted[0].columns) == 1:
            return wanted[0]
        if wanted not in self._any_of:
            self._any_of[wanted] = found = self._column()
            self.rows_of[found.columns[0][0]] = [each - found for each in wanted]
        return self._any_of[wanted]

    def _holders(self, value_id: int, moment: Moment) -> list[Linear]:
        """Who holds a value that the step made."""
        trace, index = self.trace, self.index
        value, found = trace.values[value_id], []
        for saved in index.saved_of.get(value_id, ()):
            if index.released.get(saved.id, len(trace.events)) < moment.event:
                continue
            call = None if saved.frame is None else self.calls.get(saved.frame)
            own = -1 if call is None or saved.ordinal is None else trace.programs[call.frame].slots[saved.ordinal]
            cluster = None if call is None or own < 0 else cluster_of(call.program)[own]
            if call is not None and value_id in index.casts_of[call.frame]:
                continue
            if call is None or cluster is None:
                return [ONE]
            # dropped if it is made again and not kept; what backward never reads is held if nothing makes it
            found += [self.keeps[call.unit, own], ONE - self.reruns[call.unit, cluster]]
        maker = None if value.producer is None else trace.ops[value.producer].frame
        for frame, ordinal in self.readers[value_id]:
            reads = self._will_read(frame, ordinal, moment)
            if not reads.columns or value_id in index.casts_of[frame]:
                continue
            call = self.calls[frame]
            if maker != frame or value.ordinal is None:
                found.append(reads)
            elif value.ordinal in call.program.steps[ordinal].reads:  # and not an earlier state, which a copy has
                found.append(reads + self.keeps[call.unit, value.ordinal] - ONE)
        return found

    def _copy_holders(self, call: _Call, ordinal: int, value_id: int, moment: Moment) -> list[Linear]:
        """Who holds what was made again of a value."""
        trace, index, program = self.trace, self.index, call.program
        producer = trace.values[value_id].producer
        assert producer is not None
        op = trace.ops[producer]
        if ordinal in program.held or op.ordinal is None:
            return []
        made = self._state(call, op.ordinal, moment, done=False)
        if not made.columns:
            return []
        alone = made - self.keeps[call.unit, ordinal]
        found = []
        for saved in index.slots_of[call.frame]:
            released = index.released.get(saved.id, len(trace.events))
            if saved.value == value_id and saved.read and released >= moment.event:
                found.append(alone)
        for frame, reader in self.readers[value_id]:
            if frame == call.frame and reader != op.ordinal:
                reads = self._will_read(frame, reader, moment)
                if reads.columns:
                    found.append(alone + reads - ONE)
        if moment.frame == call.frame and moment.ordinal == op.ordinal:
            found.append(self._running(call, op.ordinal, moment))
        return found

    def _states(self, moment: Moment) -> list[tuple[Linear, float]]:
        """Generator states of random ops that run again, with their bytes."""
        size, found = float(self.trace.random_state_bytes), []
        for frame, call in self.calls.items() if size else ():
            if not self.enter[frame] <= moment.event <= call.last_release or not call.loads:
                continue
            inside, first = moment.event < self.index.exits[frame], first_random(call.program)
            for ordinal, step in enumerate(call.program.steps):
                if step.kind is Kind.RANDOM:
                    if not (inside and ordinal == first):
                        found.append((self._will_read(frame, ordinal, moment), size))
                    if moment.frame == frame and moment.ordinal == ordinal:
                        found.append((self._running(call, ordinal, moment), size))  # the state to go back to
            if inside and first is not None:  # the state at the start of the unit, whatever of it runs again
                runs = [self._at_last(call, c) for c in range(len(clusters(call.program)))]
                found.append((self._any(runs), size))
        return found
