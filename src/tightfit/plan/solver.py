"""Solve mixed-integer programs in such a way that a fault of the solver costs no plan.

Idea: a solver's answer is only a claim. A point is believed if it satisfies the program's rows, which is checked here
in plain arithmetic. After an error, or after a point that breaks its own rows, the same program is solved again: first
with its rows rescaled, then rescaled and without presolve. If that fails too, the program counts as unsolved, and the
caller uses a method of its own that knows the problem.

Invariant: `Answer.values` satisfies every row, every bound and the integrality to `TOLERANCE`, whatever the solver
said. `Answer.bound` is the solver's, but never above the cost of a known point.
Refused: nothing. If a solver cannot be imported, raises, or runs past its time, the program is unsolved.

Solver: HiGHS (Huangfu and Hall, Math. Prog. Comp. 10, 2018).
"""

from __future__ import annotations

import dataclasses
import enum
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Answer", "Claim", "MixedProgram", "Verdict", "solve"]

Floats = np.ndarray[Any, np.dtype[np.float64]]

#: A row may be broken by this much, in the units of the row, and an integer missed by it: twice what HiGHS promises.
TOLERANCE = 2e-6


def scale_of(largest_bytes: float) -> float:
    """The number by which the bytes of a row are divided. The largest becomes a thousand. A row that is broken by the
    solver's tolerance is then off by a byte or so, even among gigabytes, and two releases of a solver do not differ by
    what they let pass."""
    return max(1.0, largest_bytes / 1000)


#: A search ends after so many nodes of its tree, times the program's columns. Unlike seconds, nodes are the same on a
#: busy machine.
NODES_TIMES_COLUMNS = 250_000


class Verdict(enum.Enum):
    OPTIMAL = "optimal"
    FEASIBLE = "feasible"  # a point, not proven to be the best
    INFEASIBLE = "infeasible"
    UNSOLVED = "unsolved"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MixedProgram:
    """Minimise `costs @ x` where `row_low <= rows @ x <= row_high` and `lower <= x <= upper`, and where some `x` are
    whole numbers.

    The rows are compressed: row r has the columns `indices[starts[r]:starts[r + 1]]`, with as many `coefficients`.
    """

    costs: Floats  # (columns,)
    lower: Floats  # (columns,)
    upper: Floats  # (columns,)
    integer: np.ndarray[Any, np.dtype[np.bool_]]  # (columns,)
    starts: np.ndarray[Any, np.dtype[np.int32]]  # (rows + 1,)
    indices: np.ndarray[Any, np.dtype[np.int32]]
    coefficients: Floats
    row_low: Floats  # (rows,)
    row_high: Floats  # (rows,)
    start: Floats | None = None  # (columns,) a point that is known to hold, with NaN where nothing is known of a column
    nodes: int | None = None  # at which the search ends; None: as `NODES_TIMES_COLUMNS` says
    near_start: bool = False  # `start` is so near to the best that the solver need not look for a better one around it

    @classmethod
    def of(
        cls,
        rows: Iterable[tuple[Sequence[int], Sequence[float]]],
        *,
        row_low: Sequence[float],
        row_high: Sequence[float],
        costs: Floats,
        lower: Floats,
        upper: Floats,
        integer: np.ndarray[Any, np.dtype[np.bool_]],
        start: Floats | None = None,
        nodes: int | None = None,
        near_start: bool = False,
    ) -> MixedProgram:
        """A program whose rows are given as pairs of (columns, coefficients)."""
        table = list(rows)
        return cls(
            costs=costs,
            lower=lower,
            upper=upper,
            integer=integer,
            starts=np.cumsum([0, *(len(columns) for columns, _ in table)]).astype(np.int32),
            indices=np.array([i for columns, _ in table for i in columns], dtype=np.int32),
            coefficients=np.array([c for _, coefficients in table for c in coefficients], dtype=np.float64),
            row_low=np.array(row_low, dtype=np.float64),
            row_high=np.array(row_high, dtype=np.float64),
            start=start,
            nodes=nodes,
            near_start=near_start,
        )

    def extended(self, row: tuple[Sequence[int], Sequence[float]], *, high: float, cost: float) -> MixedProgram:
        """The program with one more column, which is real, not negative and costs `cost`, and with one more row, which
        is at most `high`."""
        columns, coefficients = row
        return dataclasses.replace(
            self,
            costs=np.append(self.costs, cost),
            lower=np.append(self.lower, 0.0),
            upper=np.append(self.upper, np.inf),
            integer=np.append(self.integer, False),
            starts=np.append(self.starts, self.starts[-1] + len(columns)).astype(np.int32),
            indices=np.append(self.indices, columns).astype(np.int32),
            coefficients=np.append(self.coefficients, coefficients),
            row_low=np.append(self.row_low, -np.inf),
            row_high=np.append(self.row_high, high),
            start=None if self.start is None else np.append(self.start, np.nan),
        )

    def plus(self, cost: float) -> MixedProgram:
        """The program with one more column, which is always one: every answer costs `cost` more."""
        more = self.extended(([len(self.costs)], [1.0]), high=1.0, cost=cost)
        more.lower[-1] = more.upper[-1] = 1.0
        return more

    def rescaled(self) -> MixedProgram:
        """The same program with each row, and the costs, divided by a power of two near the middle of their sizes."""
        scale = np.ones(len(self.row_low))
        for row in range(len(scale)):
            sizes = np.abs(self.coefficients[self.starts[row] : self.starts[row + 1]])
            scale[row] = _middle(sizes)
        factors = np.repeat(scale, np.diff(self.starts))
        return dataclasses.replace(
            self,
            costs=self.costs / _middle(np.abs(self.costs)),
            coefficients=self.coefficients / factors,
            row_low=self.row_low / scale,
            row_high=self.row_high / scale,
        )

    def holds(self, values: Floats) -> bool:
        """Does `values` satisfy the program?"""
        if values.shape != self.costs.shape or not np.isfinite(values).all():
            return False
        if ((values < self.lower - TOLERANCE) | (values > self.upper + TOLERANCE)).any():
            return False
        sums = np.zeros(len(self.row_low))
        rows = np.repeat(np.arange(len(sums)), np.diff(self.starts))
        np.add.at(sums, rows, self.coefficients * values[self.indices])
        return bool(((sums >= self.row_low - TOLERANCE) & (sums <= self.row_high + TOLERANCE)).all())

    def cost(self, values: Floats) -> float:
        return float(self.costs @ values)


def _middle(sizes: Floats) -> float:
    """The power of two next to the geometric mean of the least and the largest of `sizes` that are not zero."""
    positive = sizes[sizes > 0]
    if not len(positive):
        return 1.0
    return float(2.0 ** np.round((np.log2(positive.min()) + np.log2(positive.max())) / 2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What a solver says. It is not checked yet."""

    verdict: Verdict
    said: str  # the solver's own word for how it ended
    values: Floats | None = None
    bound: float = float("-inf")
    prices: Floats | None = None  # (rows,): of a program without whole numbers, what a row's limit is worth
    out_of_time: bool = False  # or out of nodes: asking again would end the same

    def read(self) -> Claim:
        """The claim with numbers for what should be numbers. Raises what Python does where there are none."""
        values = None if self.values is None else np.asarray(self.values).astype(np.float64, casting="safe")
        prices = None if self.prices is None else np.asarray(self.prices).astype(np.float64, casting="safe")
        return dataclasses.replace(self, said=str(self.said), values=values, bound=float(self.bound), prices=prices)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A checked answer. `values` is there unless the verdict is INFEASIBLE or UNSOLVED. `how` names the solver and the
    attempt that succeeded. `prices` are only a claim: who uses them proves what follows from them."""

    verdict: Verdict
    how: str
    values: Floats | None = None
    bound: float = float("-inf")
    prices: Floats | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One way to put a program to the solver."""

    how: str
    rescaled: bool
    presolve: bool


ATTEMPTS = (
    Attempt(how="HiGHS", rescaled=False, presolve=True),
    Attempt(how="HiGHS, rows rescaled", rescaled=True, presolve=True),
    Attempt(how="HiGHS, rows rescaled, no presolve", rescaled=True, presolve=False),
)


def highs(program: MixedProgram, seconds: float, gap: float, presolve: bool) -> Claim:
    """Solve with HiGHS: silent, on one thread, with the same answer every time. `gap` is relative; zero means exact."""
    import highspy  # a machine without it plans by the callers' own methods

    solver = highspy.Highs()
    nodes = program.nodes or max(50, NODES_TIMES_COLUMNS // max(1, len(program.costs)))
    for option, value in (
        ("output_flag", False), ("threads", 1), ("random_seed", 0), ("mip_rel_gap", gap), ("mip_abs_gap", 1e-9),
        ("time_limit", seconds), ("mip_max_nodes", nodes), ("presolve", "choose" if presolve else "off"),
        ("mip_heuristic_run_feasibility_jump", False),  # a third of the time on programs as small as these, for nothing
    ):  # fmt: skip
        solver.setOptionValue(option, value)
    infinity = highspy.kHighsInf
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = len(program.costs), len(program.row_low)
    lp.col_cost_, lp.col_lower_ = program.costs, program.lower
    lp.col_upper_ = np.where(np.isinf(program.upper), infinity, program.upper)
    lp.row_lower_ = np.where(np.isinf(program.row_low), -infinity, program.row_low)
    lp.row_upper_ = np.where(np.isinf(program.row_high), infinity, program.row_high)
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_, lp.a_matrix_.index_ = program.starts, program.indices
    lp.a_matrix_.value_ = program.coefficients
    kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
    lp.integrality_ = [kinds[int(whole)] for whole in program.integer]
    solver.passModel(lp)
    if program.start is not None:
        known = np.nonzero(~np.isnan(program.start))[0].astype(np.int32)
        solver.setSolution(len(known), known, program.start[known])
        solver.setOptionValue("mip_allow_restart", False)  # which makes little of what is near the best already
    for sought in ("rins", "rens", "root_reduced_cost") if program.near_start else ():
        solver.setOptionValue(f"mip_heuristic_run_{sought}", False)  # which took half of the time
    solver.run()
    status, info = solver.getModelStatus(), solver.getInfo()
    verdict = {
        highspy.HighsModelStatus.kOptimal: Verdict.OPTIMAL,
        highspy.HighsModelStatus.kInfeasible: Verdict.INFEASIBLE,
    }.get(status, Verdict.FEASIBLE if info.primal_solution_status == 2 else Verdict.UNSOLVED)
    found = verdict in (Verdict.OPTIMAL, Verdict.FEASIBLE)
    limits = (highspy.HighsModelStatus.kTimeLimit, highspy.HighsModelStatus.kSolutionLimit)
    whole = bool(program.integer.any())
    proves = verdict is Verdict.OPTIMAL or (whole and status in limits)
    return Claim(
        verdict=verdict,
        said=str(status).rpartition(".")[2],
        values=np.array(solver.getSolution().col_value, dtype=np.float64) if found else None,
        # what a solver says of the best that is possible while it reports an error is worth nothing
        bound=float(info.mip_dual_bound if whole else info.objective_function_value) if proves else float("-inf"),
        prices=np.array(solver.getSolution().row_dual, dtype=np.float64) if found and not whole else None,
        out_of_time=status in limits,
    )


#: The solver. Tests put faulty ones here.
engine: Callable[[MixedProgram, float, float, bool], Claim] = highs


def solve(program: MixedProgram, *, seconds: float, gap: float = 0.0, attainable: bool = False) -> Answer:
    """Minimise `program` within about `seconds`, to a relative `gap`. `attainable` says that a point is known to exist;
    a solver's claim that there is none then counts as an error."""
    until = time.monotonic() + seconds
    best: Answer | None = None
    said: list[str] = []
    for attempt in ATTEMPTS:
        left = until - time.monotonic()
        if left <= 0:
            break
        put = program.rescaled() if attempt.rescaled else program
        try:
            claim = engine(put, left, gap, attempt.presolve).read()
        except (Exception, SystemExit) as error:  # whatever ends a solver must not end the plan
            said.append(f"{type(error).__name__}: {error}")
            continue
        said.append(claim.said)
        if claim.verdict is Verdict.INFEASIBLE and best is None and not attainable:
            return Answer(verdict=Verdict.INFEASIBLE, how=attempt.how)
        if claim.values is None:
            if claim.out_of_time:
                break
            continue
        values = claim.values
        if values.shape == program.costs.shape:
            values = np.where(program.integer, np.round(values), values)
        if not program.holds(values):
            said[-1] += ", with a point that breaks its rows"
            continue
        cost = program.cost(values)
        bound = claim.bound * _cost_scale(program, put)
        slack = TOLERANCE * max(1.0, abs(cost))
        bound = min(bound, cost) if bound <= cost + slack else -np.inf  # the latter also where it is no number
        proven = claim.verdict is Verdict.OPTIMAL and bound >= cost - slack - gap * abs(cost)
        if best is None or best.values is None or cost < program.cost(best.values):
            verdict = Verdict.OPTIMAL if proven else Verdict.FEASIBLE
            prices = None if attempt.rescaled else claim.prices
            best = Answer(verdict=verdict, how=attempt.how, values=values, bound=bound, prices=prices)
        if proven or claim.out_of_time:
            return best
    return best or Answer(verdict=Verdict.UNSOLVED, how="; ".join(dict.fromkeys(said)) or "no time")


def _cost_scale(program: MixedProgram, put: MixedProgram) -> float:
    """The factor from a cost of `put` to a cost of `program`."""
    largest = int(np.argmax(np.abs(program.costs))) if len(program.costs) else 0
    if not len(program.costs) or not put.costs[largest]:
        return 1.0
    return float(program.costs[largest] / put.costs[largest])
