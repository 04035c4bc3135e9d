"""Points of a unit's trade-off without a solver, by minimum cuts for a price of memory.

Idea: put a price on every kept byte. The question which values to keep and which clusters of ops to rerun, at the least
seconds plus price, is then a minimum cut, as in project selection (Picard, Management Science 22(11), 1976). A cluster
that reruns costs its seconds. A wanted value whose cluster does not rerun must be kept and costs its price. To find a
new corner between two known points, set the price at which these two cost the same, and cut again. In this way every
corner of the lower convex hull is found (Eisner and Severance, J. ACM 23(4), 1976).

Invariant: no kept set lies below the line through two neighbouring corners. The arithmetic is in whole numbers, so ties
and rounding cannot move a corner.
Refused: points off the hull, which no price finds. `plan.frontier` calls this module where the solver has no answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from tightfit.core import Program
from tightfit.plan.program import cluster_of, clusters, demands, rerunnable

__all__ = ["fewest", "hull"]

#: Seconds are counted in whole picoseconds.
_PER_SECOND = 10**12


def hull(
    program: Program,
    sizes_bytes: Sequence[int],
    seconds: Sequence[float],
    many: int,
    inputs: Sequence[tuple[int, frozenset[int]]] = (),
) -> list[frozenset[int]]:
    """The kept sets at the corners of the hull, from the most bytes to the fewest: `many`, or a few more.

    `sizes_bytes[v]` is the size of the value with ordinal v, `seconds[i]` the time of the op with ordinal i. Values in
    `program.held` are not in the sets. `inputs` are pairs of a size and the clusters that read it: those bytes count as
    kept if one of the clusters reruns.
    """
    network = _Network(program, sizes_bytes, seconds, inputs)
    fastest, smallest = network.cut(1, network.total_bytes + 1), network.smallest()
    corners = {fastest.kept: fastest, smallest.kept: smallest}
    pending = deque([(fastest, smallest)])
    while pending and len(corners) < many:
        one, other = pending.popleft()
        if one.size <= other.size or one.time >= other.time:
            continue
        between = network.cut(other.time - one.time, one.size - other.size)
        balance = between.size * (other.time - one.time) + between.time * (one.size - other.size)
        line = one.size * (other.time - one.time) + one.time * (one.size - other.size)
        if balance < line:
            corners[between.kept] = between
            pending += [(one, between), (between, other)]
    return [corner.kept for corner in sorted(corners.values(), key=lambda corner: (-corner.size, corner.time))]


def fewest(
    program: Program,
    sizes_bytes: Sequence[int],
    seconds: Sequence[float],
    inputs: Sequence[tuple[int, frozenset[int]]] = (),
) -> frozenset[int]:
    """The kept set of the fewest bytes that are possible, and of the fewest seconds among those. `inputs` as in
    `hull`."""
    return _Network(program, sizes_bytes, seconds, inputs).smallest().kept


class _Corner:
    __slots__ = ("kept", "size", "time")

    def __init__(self, kept: frozenset[int], size: int, time: int) -> None:
        self.kept, self.size, self.time = kept, size, time


class _Network:
    """The network of the cut. Its nodes are source, sink, one for each cluster ("it reruns"), one for each value ("it
    is wanted") and one for each input ("it is held"). A node on the source's side of the cut means yes."""

    def __init__(
        self,
        program: Program,
        sizes_bytes: Sequence[int],
        seconds: Sequence[float],
        inputs: Sequence[tuple[int, frozenset[int]]],
    ) -> None:
        groups, self.owner = clusters(program), cluster_of(program)
        self.sizes = [int(size) for size in sizes_bytes]
        self.times = [round(sum(seconds[op] for op in ops) * _PER_SECOND) for ops in groups]
        # every cluster costs a tiny amount more, so that none reruns for nothing
        self.times = [time * (len(groups) + 1) + 1 for time in self.times]
        self.clusters, self.values = len(groups), program.values
        self.fixed = [not may_run for may_run in rerunnable(program)]
        self.inputs = inputs
        self.total_time = sum(self.times)
        self.total_bytes = sum(self.sizes) + sum(size for size, _ in inputs)
        free = frozenset(program.held)
        self.priced = [v for v in range(program.values) if self.owner[v] is not None and v not in free]
        self.needed = [v for v in program.needed if self.owner[v] is not None and v not in free]
        self.wants: list[tuple[int, int]] = []  # (cluster, value that it reads)
        self.follows: list[tuple[int, int]] = []  # (cluster, cluster that must then rerun as well)
        for cluster, (final, early) in enumerate(demands(program)):
            self.wants += [(cluster, v) for v in final if self.owner[v] is not None and v not in free]
            self.follows += [(cluster, owner) for v in early if (owner := self.owner[v]) not in (None, cluster)]  # type: ignore[misc]

    def smallest(self) -> _Corner:
        return self.cut(self.total_time + 1, 1)

    def cut(self, price: int, per: int) -> _Corner:
        """The kept set of the least `per` x time + `price` x bytes."""
        first_value, first_input = self.clusters, self.clusters + self.values
        source = first_input + len(self.inputs)
        sink = source + 1
        endless = 1 + per * self.total_time + price * self.total_bytes
        flow = _Flow(sink + 1)
        for cluster in range(self.clusters):
            flow.edge(cluster, sink, endless if self.fixed[cluster] else per * self.times[cluster])
        for value in self.priced:
            owner = self.owner[value]
            assert owner is not None
            flow.edge(first_value + value, owner, price * self.sizes[value])
        for value in self.needed:
            flow.edge(source, first_value + value, endless)
        for cluster, value in self.wants:
            flow.edge(cluster, first_value + value, endless)
        for cluster, other in self.follows:
            flow.edge(cluster, other, endless)
        for place, (size, readers) in enumerate(self.inputs):
            flow.edge(first_input + place, sink, price * size)
            for cluster in readers:
                flow.edge(cluster, first_input + place, endless)
        yes = flow.source_side(source, sink)
        kept = frozenset(v for v in self.priced if first_value + v in yes and self.owner[v] not in yes)
        held_bytes = sum(size for place, (size, _) in enumerate(self.inputs) if first_input + place in yes)
        time = sum(self.times[cluster] for cluster in range(self.clusters) if cluster in yes)
        return _Corner(kept, sum(self.sizes[v] for v in kept) + held_bytes, time)


class _Flow:
    """Maximum flow by shortest augmenting layers (Dinic, Soviet Math. Doklady 11, 1970), in whole numbers."""

    def __init__(self, nodes: int) -> None:
        self.out: list[list[int]] = [[] for _ in range(nodes)]
        self.to: list[int] = []
        self.room: list[int] = []

    def edge(self, start: int, end: int, capacity: int) -> None:
        for node, other, room in ((start, end, capacity), (end, start, 0)):
            self.out[node].append(len(self.to))
            self.to.append(other)
            self.room.append(room)

    def source_side(self, source: int, sink: int) -> set[int]:
        """Send all the flow there can be; the nodes that still have a way from `source`."""
        while True:
            layer = self._layers(source)
            if sink not in layer:
                return set(layer)
            self._saturate(source, sink, layer)

    def _layers(self, source: int) -> dict[int, int]:
        layer = {source: 0}
        queue = deque([source])
        while queue:
            node = queue.popleft()
            for edge in self.out[node]:
                if self.room[edge] and self.to[edge] not in layer:
                    layer[self.to[edge]] = layer[node] + 1
                    queue.append(self.to[edge])
        return layer

    def _saturate(self, source: int, sink: int, layer: dict[int, int]) -> None:
        """A blocking flow along the layers, without recursion: a unit may have thousands of ops."""
        at = [0] * len(self.out)
        path: list[int] = []
        node = source
        while True:
            if node == sink:
                least = min(self.room[edge] for edge in path)
                for edge in path:
                    self.room[edge] -= least
                    self.room[edge ^ 1] += least
                path.clear()
                node = source
            elif at[node] < len(self.out[node]):
                edge = self.out[node][at[node]]
                if self.room[edge] and layer.get(self.to[edge]) == layer[node] + 1:
                    path.append(edge)
                    node = self.to[edge]
                else:
                    at[node] += 1
            elif path:
                edge = path.pop()
                node = self.to[edge ^ 1]
                at[node] += 1
            else:
                return
