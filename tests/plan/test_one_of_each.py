"""One option of each unit, by the relaxation's prices, against all choices."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from tests.plan.test_solver import broken

from tightfit.plan import one_of_each, solver
from tightfit.plan.one_of_each import OneOfEach, columns_of, solved
from tightfit.plan.solver import Verdict

GAP = 1e-3


def drawn(seed: int, *, lowest: bool) -> tuple[OneOfEach, list[list[int]]]:
    """A choice, and all that it might be."""
    draw = np.random.default_rng(seed)
    groups, costs, usage = [], [], []
    for _ in range(5):
        count = int(draw.integers(1, 6))
        start = groups[-1].stop if groups else 0
        groups.append(slice(start, start + count))
        costs += np.sort(draw.random(count)).tolist()
        usage.append(-np.sort(-draw.random((12, count)), axis=1) * 1e6)
    table = np.concatenate(usage, axis=1)
    every = [list(each) for each in itertools.product(*(range(group.start, group.stop) for group in groups))]
    peaks = sorted(float(table[:, each].sum(axis=1).max()) for each in every)
    top = np.full(12, 0.0 if lowest else -peaks[len(peaks) // 3])
    return OneOfEach(costs=np.array(costs), usage=table, top=top, groups=groups, lowest=lowest, own=0.5), every


@pytest.fixture(autouse=True)
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few options count as many here."""
    monkeypatch.setattr(one_of_each, "FEW", 4)
    for name in ("_EACH", "_ROWS", "_RELAXED_ROWS"):
        monkeypatch.setattr(one_of_each, name, 1)


@pytest.mark.parametrize("lowest", [False, True])
@pytest.mark.parametrize("seed", range(30))
def test_the_answer_is_within_the_gap_and_the_bound_is_one(seed: int, lowest: bool) -> None:
    choice, every = drawn(seed, lowest=lowest)
    if lowest:
        choice = OneOfEach(costs=choice.costs, usage=choice.usage, top=choice.top, groups=choice.groups, lowest=True)
    fits = [each for each in every if lowest or (choice.top + choice.usage[:, each].sum(axis=1) <= 0).all()]
    best = min(choice.cost(each) for each in fits)
    answer = solved(choice, seconds=10.0, gap=GAP)
    assert answer.values is not None
    chosen = columns_of(answer.values, choice.groups)
    assert chosen in fits, "the answer breaks a row"
    assert best - 1e-9 <= choice.cost(chosen) <= best * (1 + GAP) + 1e-9
    assert answer.verdict is Verdict.OPTIMAL
    assert best - 2 * GAP * best <= answer.bound <= best + 1e-9


@pytest.mark.parametrize("seed", range(30))
def test_the_prices_say_what_each_option_costs_at_least(seed: int) -> None:
    choice, every = drawn(seed, lowest=False)
    fits = [each for each in every if (choice.top + choice.usage[:, each].sum(axis=1) <= 0).all()]
    relaxed = one_of_each._relaxed(choice, 10.0)
    assert relaxed is not None
    for column in range(len(choice.costs)):
        with_it = [choice.cost(each) for each in fits if column in each]
        assert not with_it or relaxed.bound + relaxed.dearer[column] <= min(with_it) + 1e-9


@pytest.mark.parametrize("fault", ["raises", "error", "not numbers", "halves", "no claim", "bound above"])
def test_without_the_relaxation_the_whole_program_is_put(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the solver in the relaxation alone costs nothing."""
    faulty = broken(fault)
    monkeypatch.setattr(
        solver, "engine", lambda program, *rest: (solver.highs if program.integer.any() else faulty)(program, *rest)
    )
    choice, every = drawn(3, lowest=False)
    fits = [each for each in every if (choice.top + choice.usage[:, each].sum(axis=1) <= 0).all()]
    answer = solved(choice, seconds=10.0, gap=GAP)
    assert answer.values is not None
    best = min(choice.cost(each) for each in fits)
    assert choice.cost(columns_of(answer.values, choice.groups)) <= best * (1 + GAP) + 1e-9
    assert answer.bound <= best + 1e-9
