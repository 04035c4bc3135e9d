"""What the replays of several units hold is counted once, and never too little."""

from __future__ import annotations

import itertools
import random

import numpy as np
import torch
from tests.plan.stacks import steady
from torch import nn
from torch.nn import functional

import tightfit
from tightfit.plan.holders import counted_once, holding
from tightfit.plan.ways import way_of


class Reading(nn.Module):
    """Every layer reads all that was made before it, as in a dense network."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(32 * (i + 2)) for i in range(8))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        made = [inputs, inputs * 2]
        for layer in self.layers:
            made.append(layer(made))
        return torch.cat(made, -1).square().mean()


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 16), nn.Linear(16, 32)

    def forward(self, before: list[torch.Tensor]) -> torch.Tensor:
        out: torch.Tensor = self.down(functional.silu(self.up(self.norm(torch.cat(before, -1)))))
        return out


def test_the_model_of_a_dense_network_sees_the_peak_that_the_referee_sees() -> None:
    torch.manual_seed(0)
    trace = steady(tightfit.trace(Reading(), torch.randn(256, 32), tiles=False))
    static = sum(trace.static_bytes.values())
    way = way_of(trace)
    for part in (0.5, 0.6, 0.75):
        solution = way.model.solve(static + int(part * (tightfit.simulate(trace).peak_bytes - static)))
        assert solution is not None
        modelled = way.model.peak_bytes(solution.points) - static
        refereed = way.refereed(solution.points, way.model)[1].peak_bytes - static
        assert 0.98 * modelled < refereed < 1.02 * modelled, part


def test_a_value_is_there_while_any_unit_holds_it() -> None:
    """Against the union of what the chosen options hold, for all choices of random options."""
    draw = random.Random(0)
    for _ in range(40):
        sizes = [draw.randrange(1, 9) for _ in range(4)]
        begins = [draw.randrange(3) for _ in sizes]
        held: dict[str, list[dict[int, tuple[int, int]]]] = {
            path: [{}] + [{v: (begins[v], end) for v in draw.sample(range(4), 2)} for _ in range(2)]
            for path, end in zip("abc", draw.sample(range(3, 12), 3), strict=True)
        }
        firsts = np.array(sorted(draw.sample(range(12), 4)))
        lasts = np.append(firsts[1:] - 1, 11)
        found = holding(held, sizes, firsts, lasts)
        options = [[(path, i) for i in range(3)] for path in held]
        for chosen in itertools.product(*options):
            used = found.usage[:, found.needed(chosen)].sum(axis=1)
            together: dict[int, int] = {}
            for path, i in chosen:
                for value, (_, last) in held[path][i].items():
                    together[value] = max(together.get(value, -1), last)
            expected = [
                sum(sizes[v] for v, last in together.items() if begins[v] <= end and begin <= last)
                for begin, end in zip(firsts, lasts, strict=True)
            ]
            assert used.tolist() == expected
        every = [*itertools.chain(*options)]
        for option, alone in zip(every, found.apart(every).T, strict=True):
            assert alone.tolist() == found.usage[:, found.needed([option])].sum(axis=1).tolist()


def test_only_values_that_are_counted_too_often_by_much_get_columns() -> None:
    assert counted_once([1000, 1000, 1], {0: 3, 1: 1, 2: 3}) == {0}
    many = {value: 400 for value in range(10)}
    assert len(counted_once([8] * 10, many)) == 3  # the solver's time grows with the columns
