"""How far rounding may take a gradient from float64: the limit, and its false-alarm rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tightfit.core import Check

#: How much further from float64 than the step without the plan a plan with tiles may be.
TILE_FACTOR = 1.5


TOLERANCE = (
    f"loss and gradients are not bit for bit, but no further from float64 than {TILE_FACTOR} x the step without it"
)


Named = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Errors:
    """Of one tensor, against float64: the norms of the errors without and with the plan, over one or more steps."""

    untiled: float
    tiled: float
    rounding: float  # what rounding every number to the dtype may cost
    size: int  # numbers
    draws: int  # steps


def errors_of(untiled: torch.Tensor | None, tiled: torch.Tensor | None, exact: torch.Tensor) -> Errors:
    size = exact.numel()
    if untiled is None or tiled is None or tiled.shape != untiled.shape or tiled.dtype is not untiled.dtype:
        return Errors(untiled=0.0, tiled=math.inf, rounding=0.0, size=size, draws=1)
    one, other = (float((t.double() - exact).norm()) for t in (untiled, tiled))
    return Errors(
        untiled=one,
        tiled=other,
        rounding=float(exact.norm()) * torch.finfo(untiled.dtype).eps / 2,
        size=size,
        draws=1,
    )


def mean_of(each: list[Errors]) -> Errors:
    def mean(sizes: list[float]) -> float:
        return math.sqrt(sum(x * x for x in sizes) / len(sizes))

    return Errors(
        untiled=mean([e.untiled for e in each]),
        tiled=mean([e.tiled for e in each]),
        rounding=mean([e.rounding for e in each]),
        size=each[0].size,
        draws=len(each),
    )


def ratio_of(errors: Errors) -> float:
    """The error with tiles against that without, or against one rounding where that is more: nothing is nearer than
    that but by luck."""
    ratio = errors.tiled / max(errors.untiled, errors.rounding, 1e-300) if errors.tiled else 0.0
    return ratio if ratio == ratio else math.inf  # no number is beyond any limit


#: Of the normal distribution, what one in a hundred million lies above.
_ONE_IN_1E8 = 5.612


#: Of the square root of a tensor's numbers, as many errors count as independent.
_INDEPENDENT = 2 / 3


def limit(errors: Errors) -> float:
    """How many times the untiled error the tiled one may be.

    Two sums of the same terms in another order have errors of the same size, not the same errors. For one step the
    limit is `TILE_FACTOR`, or the distance of two neighbours in the dtype. Where that does not decide, the mean squares
    of the errors over several steps are compared, as two variances are. Half the logarithm of their ratio is near a
    normal distribution with variance 1 / (d - 1), where d is the number of independent errors in each (Fisher's z;
    Snedecor and Cochran, Statistical Methods). The numbers of one tensor share roundings. Of n numbers two thirds of
    the square root of n count as independent: `benchmarks/rounding.py` finds on each processor's kernels that this is
    few enough.

    So the limit is passed by chance once in 10^8 tensors whose error is truly `TILE_FACTOR` times as large, and less
    often where it is not (of fewer than 16 numbers, once in 10^5).
    """
    if errors.draws == 1:
        one_rounding = 2 * errors.rounding / max(errors.untiled, errors.rounding, 1e-300)
        return max(TILE_FACTOR, one_rounding)
    return TILE_FACTOR * math.exp(_ONE_IN_1E8 / math.sqrt(errors.draws * _INDEPENDENT * math.sqrt(errors.size) - 1))


_HOW = (
    "own error against float64 (at least one rounding); where one step does not decide, over four, by as much more as "
    "chance needs (one false alarm in 10^8 tensors)"
)


_TILED = ("tiles", f"{TILE_FACTOR} x the untiled run's {_HOW}; dropout off")


COMPILED = ("the plan", f"{TILE_FACTOR} x the compiled run's {_HOW}; dropout as it is")


def float64_check(name: str, errors: dict[str, Errors], what: str, said: tuple[str, str] = _TILED) -> Check:
    wrong = [key for key in errors if ratio_of(errors[key]) > limit(errors[key])]
    worst = max(errors, key=lambda key: ratio_of(errors[key]) / limit(errors[key]), default=None)
    without, tolerance = said
    measured = f"{len(errors)} within" if not wrong else f"{len(wrong)} of {len(errors)} beyond, first {wrong[0]}"
    if worst is not None:
        each = errors[worst]
        size = f", norm of error {each.tiled:.3g} against {each.untiled:.3g}" if each.rounding else ""
        allowed = "" if each.draws == 1 else f" of {limit(each):.2f} x allowed for {each.size} numbers"
        measured += f"; worst {ratio_of(each):.2f} x{allowed} at {worst}{size}"
    return Check(
        name=name,
        expected=f"the error {what} against float64 is at most {TILE_FACTOR} x that without {without}",
        measured=measured,
        tolerance=tolerance,
        passed=not wrong,
    )


def random_check(own: tuple[Named, Named], errors: dict[str, Errors]) -> Check:
    """Two that are each so near the exact one are at most the sum apart; another mask is orders of magnitude off."""
    one, other = own
    wrong, worst = [], 0.0
    for name, each in errors.items():
        if name not in one or name not in other:
            wrong.append(name)
            continue
        apart = (1 + limit(each)) * max(each.untiled, each.rounding, 1e-300)
        ratio = float((one[name].double() - other[name].double()).norm()) / apart
        worst = max(worst, ratio)
        if not ratio <= 1:
            wrong.append(name)
    return Check(
        name="random numbers",
        expected="with the compiler's own random numbers, the same loss and gradients as without the plan",
        measured=f"{len(errors) - len(wrong)} of {len(errors)} the same, worst {worst:.2g} of the tolerance"
        + (f", first {wrong[0]}" if wrong else ""),
        tolerance=f"1 + what the plan may be ({TILE_FACTOR} or more) x the compiled run's own error against float64",
        passed=not wrong,
    )
