"""From "these values are kept" to what each op of a unit does in backward.

Idea: backward needs some of the unit's values. A kept one is there. Any other must be made again, and so must every
value that its making reads, back to kept values and the unit's inputs. The ops of this closure are *live*: they run
again. All other ops are *dead*: their results are kept, or neither backward nor a live op reads them. They do not run
again.

Invariant: `recipe` is the smallest such closure, so the kept set alone decides how many ops rerun.
Refused: a kept set whose closure holds an op that must not run twice (`Unsupported`).
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from tightfit.core import Action, Kind, Program, Step, Unsupported


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)  # one object per (program, kept): see `recipe`
class Recipe:
    """What one frame of a unit does in forward and backward.

    `drop[j]` says that saved tensor j is not held, because `runs` make it again. `states` are the random ops among
    `runs`; each needs the generator state that it had in forward.
    """

    runs: frozenset[int]  # live ops: they run again, each when something first asks for what it makes
    slots_dropped: tuple[bool, ...]
    rematerialised: frozenset[int]  # values that are made again and not kept; saved tensors of them are dropped
    states: frozenset[int]
    captured: frozenset[int]  # kept values that live ops read as they were left
    dropped: frozenset[int]  # values that backward reads and that are made again
    lends: frozenset[int]  # values that it makes again for other units
    replays: bool


@functools.lru_cache(maxsize=4096)
def clusters(program: Program) -> tuple[tuple[int, ...], ...]:
    """Groups of ops that must run together because they write the same value. Views belong to none.

    There is one entry for each cluster, with its op ordinals ascending. The clusters are in the order of their first
    ops.
    """
    leader: dict[int, int] = {}  # value -> op
    parent = list(range(len(program.steps)))

    def root(op: int) -> int:
        while parent[op] != op:
            op = parent[op]
        return op

    for i, step in enumerate(program.steps):
        for value in step.writes:
            first = leader.setdefault(value, i)
            a, b = sorted((root(first), root(i)))
            parent[b] = a
    members: dict[int, list[int]] = {}
    for i, step in enumerate(program.steps):
        if step.writes:
            members.setdefault(root(i), []).append(i)
    return tuple(tuple(ops) for _, ops in sorted(members.items()))


@functools.lru_cache(maxsize=4096)
def cluster_of(program: Program) -> tuple[int | None, ...]:
    """Cluster index of each value; None for a value that no recorded op writes."""
    found: list[int | None] = [None] * program.values
    for index, ops in enumerate(clusters(program)):
        for op in ops:
            for value in program.steps[op].writes:
                found[value] = index
    return tuple(found)


@functools.lru_cache(maxsize=4096)
def demands(program: Program) -> tuple[tuple[frozenset[int], frozenset[int]], ...]:
    """For each cluster, the values that running it reads, without those that it makes itself: (in their final state, in
    an earlier state)."""
    found = []
    for ops in clusters(program):
        steps = [program.steps[op] for op in ops]
        own = {value for step in steps for value in step.writes}
        early = {value for step in steps for value in step.reads_early}
        final = {value for step in steps for value in step.reads}
        found.append((frozenset(final - own - early), frozenset(early - own)))
    return tuple(found)


@functools.lru_cache(maxsize=4096)
def rerunnable(program: Program) -> tuple[bool, ...]:
    """For each cluster, may its ops run twice? Each must be rerunnable, and none may be opaque."""
    may = [step.rerunnable and step.kind is not Kind.OPAQUE for step in program.steps]
    return tuple(all(may[op] for op in ops) for ops in clusters(program))


@functools.lru_cache(maxsize=65536)
def live_clusters(program: Program, kept: frozenset[int], lends: frozenset[int] = frozenset()) -> frozenset[int]:
    """Clusters that must run again when the values `kept` are kept, and other units ask for the values `lends`. Raises
    `Unsupported` if one of the clusters must not run twice."""
    owner, demanded_by, may_run = cluster_of(program), demands(program), rerunnable(program)
    live: set[int] = set()
    pending = [v for v in (*program.needed, *lends) if v not in kept]
    while pending:
        value = pending.pop()
        cluster = owner[value]
        if cluster is None:
            raise Unsupported("a value that backward reads was made outside any recorded op and cannot be made again")
        if cluster in live:
            continue
        if not may_run[cluster]:
            raise Unsupported(f"{program.steps[clusters(program)[cluster][0]].name} must not run twice")
        live.add(cluster)
        final, early = demanded_by[cluster]
        pending += [v for v in final if v not in kept] + list(early)
    return frozenset(live)


@functools.lru_cache(maxsize=65536)
def recipe(program: Program, kept: frozenset[int], lends: frozenset[int] = frozenset()) -> Recipe:
    """What to do in a frame that keeps the values `kept`, and that makes `lends` again when another unit asks.

    Raises `Unsupported` when that cannot be done, or when a value is to be both kept and lent.
    """
    if kept & lends:
        raise Unsupported(f"the values {sorted(kept & lends)} cannot be both kept and made again")
    live = live_clusters(program, kept, lends)
    groups = clusters(program)
    live_ops = {op for cluster in live for op in groups[cluster]}
    made = {v for cluster in live for op in groups[cluster] for v in program.steps[op].writes}
    # an op that reads the final state of a kept value reads the original, even if live ops make an earlier state again
    captured = frozenset(v for op in live_ops for v in program.steps[op].reads if v in kept)
    needed = set(program.needed)
    return Recipe(
        runs=frozenset(live_ops),
        # a value that is neither kept nor made again was never read by backward; it is held in case backward reads it
        slots_dropped=tuple(value in made and value not in kept for value in program.slots),
        rematerialised=frozenset(made - kept),
        states=frozenset(i for i in live_ops if program.steps[i].kind is Kind.RANDOM),
        captured=captured,
        dropped=frozenset(needed - kept),
        lends=lends,
        replays=bool((needed | lends) - kept),
    )


@functools.lru_cache(maxsize=65536)
def leading_to(program: Program, chosen: Recipe, value: int) -> tuple[int, ...]:
    """The live ops that make `value` from what is held and from the unit's inputs, in the order in which they run."""
    return _Runs(program, chosen).closure(value, set())


@functools.lru_cache(maxsize=65536)
def demanded(program: Program, chosen: Recipe, loads: tuple[int, ...]) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Which ops run at each of `loads`: pairs of (load, op ordinals in the order in which they run). Loads that make
    nothing run are left out. `loads` are the ordinals of dropped saved tensors, in the order in which backward first
    reads them.

    An op runs when something first needs what it makes. Ops that change the same value, and live ops that read it in
    between, run together.
    """
    runs = _Runs(program, chosen)
    done: set[int] = set()
    found = []
    for load in loads:
        ops = runs.closure(program.slots[load], done)
        if ops:
            found.append((load, ops))
    return tuple(found)


@functools.lru_cache(maxsize=65536)
def run_for_sweeps(program: Program, chosen: Recipe) -> frozenset[int]:
    """Live ops that none of the unit's own saved tensors asks for. They run only to make what the unit lends."""
    runs = _Runs(program, chosen)
    own: set[int] = set()
    done: set[int] = set()
    for value in chosen.rematerialised.intersection(program.slots):
        own.update(runs.closure(value, done))
    return chosen.runs - own


def reads_copy(step: Step, chosen: Recipe, value: int) -> bool:
    """Live ops make `value` again: does this live op then read the copy, and not the original? It reads the original if
    the value is also kept, unless it reads a state that a later op has changed."""
    return value in chosen.rematerialised or value not in step.reads


class _Runs:
    """What runs again under a recipe, and what runs together: ops that change the same value, and live ops that read it
    in between."""

    def __init__(self, program: Program, chosen: Recipe) -> None:
        self.owner, self.groups, self.demanded_by = cluster_of(program), clusters(program), demands(program)
        self.chosen = chosen
        leader = list(range(len(self.groups)))

        def root(cluster: int) -> int:
            while leader[cluster] != cluster:
                cluster = leader[cluster]
            return cluster

        self.live = [ops[0] in chosen.runs for ops in self.groups]  # by cluster
        live = [cluster for cluster, runs in enumerate(self.live) if runs]
        for cluster in live:
            for value in self.demanded_by[cluster][1]:
                other = self.owner[value]
                if other is not None and self.live[other]:
                    leader[root(other)] = root(cluster)
        self.joined = [root(cluster) for cluster in range(len(self.groups))]  # the first of those that run together
        self.members: dict[int, list[int]] = {}  # all that run together, by their first
        for cluster in live:
            self.members.setdefault(self.joined[cluster], []).append(cluster)

    def closure(self, value: int, done: set[int]) -> tuple[int, ...]:
        """The ops that must run to make `value`, except the groups in `done`, which have run. The groups that are found
        are added to `done`."""
        wanted: set[int] = set()
        pending = [value]
        while pending:
            made_by = self.owner[pending.pop()]
            if made_by is None or not self.live[made_by]:
                continue
            group = self.joined[made_by]
            if group in done or group in wanted:
                continue
            wanted.add(group)
            for cluster in self.members[group]:
                final, early = self.demanded_by[cluster]
                pending += [*(v for v in final if v in self.chosen.rematerialised), *early]
        done |= wanted
        return tuple(sorted(op for group in wanted for cluster in self.members[group] for op in self.groups[cluster]))


def shared(programs: Collection[Program]) -> Program | None:
    """One program for all calls of a unit, which one plan is to serve. None: the calls run different ops, so no program
    can.

    Autograd may save other tensors in one call than in another (a call whose input needs no gradient saves less). A
    value is needed if any call needs it. It counts as held only if every call holds it.
    """
    distinct = list(dict.fromkeys(programs))
    longest = max(distinct, key=lambda program: len(program.slots))
    if len(distinct) == 1:
        return longest
    if any(program.steps != longest.steps or program.values != longest.values for program in distinct):
        return None
    needed = {value for program in distinct for value in program.needed}
    if all(program.slots == longest.slots for program in distinct):
        wanted = tuple(any(each) for each in zip(*(program.wanted for program in distinct), strict=True))
    else:  # the numbers of the saved tensors say nothing, so a value that is read is taken to be read as each of them
        wanted = tuple(value in needed for value in longest.slots)
    more = tuple(sorted(needed.difference(longest.slots)))
    held = set(longest.held).intersection(*(program.held for program in distinct))
    merged = Program(
        steps=longest.steps,
        slots=longest.slots + more,
        wanted=wanted + (True,) * len(more),
        values=longest.values,
        held=tuple(sorted(held)),
    )
    return merged.the_first()


def expected(slots: Sequence[int], wanted: Sequence[bool], index: int, value: int) -> bool | None:
    """Is backward expected to read saved tensor `index` of a call, which is `value`? None: no plan was made for this
    tensor.

    Where the program has the same saved tensor, its own `slots` and `wanted` say. In a call that saves others, every
    value that any call reads is expected to be read.
    """
    if index < len(slots) and slots[index] == value:
        return wanted[index]
    return True if any(want and each == value for each, want in zip(slots, wanted, strict=True)) else None


@functools.lru_cache(maxsize=65536)
def dropped_slots(planned: Program, call: Program, chosen: Recipe) -> tuple[tuple[int, bool], ...]:
    """The saved tensors of `call` that are not held under `chosen`, a recipe of the shared program `planned`: their
    ordinals, each with whether backward is expected to read it."""
    found = []
    for index, value in enumerate(call.slots):
        counted = expected(planned.slots, planned.wanted, index, value) if value in chosen.rematerialised else None
        if counted is not None:
            found.append((index, counted))
    return tuple(found)


def kept_values(actions: Collection[Action]) -> frozenset[int]:
    """Ordinals of the values that are not made again: they are kept, on the device or elsewhere."""
    return frozenset(i for i, action in enumerate(actions) if action is not Action.RECOMPUTE)


def offloaded_values(actions: Collection[Action]) -> frozenset[int]:
    """Ordinals of the values that wait elsewhere between forward and backward."""
    return frozenset(i for i, action in enumerate(actions) if action is Action.OFFLOAD)


def first_random(program: Program) -> int | None:
    """Ordinal of the first op that draws random numbers. Its generator state is the one that the whole unit started
    with."""
    return next((i for i, step in enumerate(program.steps) if step.kind is Kind.RANDOM), None)
