"""The plan that a step is fitted with: made here, made together with other ranks, or given.

Invariant: all ranks of one model have the same plan, and each has looked at what it means for its own step. Refused: a
plan that was given, and is not one of this step or takes more than its budget (`PlanMismatch`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tightfit.core import (
    BudgetInfeasible,
    InvalidInput,
    Lever,
    Plan,
    PlanMismatch,
    TightfitError,
    Trace,
    Unsupported,
    by_name,
    dumps,
    format_apart,
    loads,
    parse_bytes,
    percentage,
)
from tightfit.engine.limits import lowered, planned_here, share_of_device, shared_place
from tightfit.levers import allowed, every, inexact, not_allowed, ruled_out, used
from tightfit.plan import plan as make_plan
from tightfit.plan import simulate
from tightfit.plan.account import host_bytes
from tightfit.plan.rebase import rebased
from tightfit.step.patches import compiled_entries
from tightfit.step.placement import in_host_bytes
from tightfit.step.ranks import Meeting, are_several
from tightfit.step.run import device_of

__all__ = ["asked_in_vain", "caveats_of", "planned", "what_is_given"]


def what_is_given(
    budget: str | int | None, plan: Plan | str | Path | None, micro_batch: str | int | None = None
) -> str | int | Plan:
    """What a step is to be fitted to: a budget, or a plan that is there already. A budget beside a plan takes the place
    of the plan's own. Raises `InvalidInput` for neither, and for a file that is no plan."""
    if plan is None:
        if budget is None:
            raise InvalidInput("neither a budget nor a plan was given: give budget='22GiB', say, or plan='plan.json'")
        return budget
    if micro_batch is not None:
        raise InvalidInput("a plan is for one size of batch, and micro-batches look for another: leave one of them out")
    if not isinstance(plan, (str, Path, Plan)):
        raise InvalidInput(f"expected plan= to be a Plan or the path of its file, found {type(plan).__name__}")
    found = plan if isinstance(plan, Plan) else Plan.load(plan)
    if budget is None:
        return found
    if percentage(budget) is not None:
        raise InvalidInput(f"a budget beside a plan takes the place of its bytes, so it is a size, not {budget!r}")
    return dataclasses.replace(found, budget_bytes=parse_bytes(budget))


def caveats_of(plan: Plan) -> str:
    """What an inexact plan means for the bits, as the rest of "the plan ..."."""
    return " and ".join(each.caveat for each in used(plan) if each.caveat)


def asked_in_vain(
    model: nn.Module,
    trace: Trace | None,
    asked: str | int | Plan,
    levers: Collection[Lever] | None,
    beside: Collection[Lever] | None,
) -> tuple[str, ...]:
    """What to tell who named levers that the plan for `trace` could not use. A plan that was given has its own."""
    if trace is None or isinstance(asked, Plan):
        return ()
    others = by_name(beside) - {each.lever for each in every() if each.is_default}
    if not others or not compiled_entries(model):
        return ruled_out(trace, levers, beside)
    names = sorted(each.value for each in others)
    return (
        *ruled_out(trace, levers),
        not_allowed(names, "it is compiled, and compiled steps are planned without; leave one of the two out"),
    )


def planned(
    record: Callable[[bool], Trace],
    budget: str | int | Plan,
    levers: Collection[Lever] | None,
    model: nn.Module,
    exact: bool = False,
    beside: Collection[Lever] | None = None,
    host_budget: int | None = None,
    there: torch.device | None = None,
    spilled: bool = False,
) -> tuple[Trace, Plan]:
    """The step of `model` and its plan; in tiles, which take longer to record, only where nothing exact fits.

    `record`: traces the step, with tiles or without. Where several processes train the model, each records its own
    step, the one with the highest peak makes the plan, and all have looked at what it means for theirs. A plan in
    place of a budget is taken as it is, if it is one of this step. `there`: the device that the model is to be put on.
    `spilled`: what waits off the device does so in a file.
    """
    if isinstance(budget, Plan):
        if exact and not budget.exact:
            raise InvalidInput(
                f"exact=True was asked for, and the plan that was given {caveats_of(budget)}: leave one of them out"
            )
        left_out = [each.lever.value for each in used(budget) if levers is not None and each.lever not in levers]
        if left_out:
            raise InvalidInput(
                f"the plan that was given uses {', '.join(left_out)}, which the levers that were asked for leave out: "
                "add it, or leave the levers to the plan"
            )
        given = functools.partial(_given, record, budget, model, host_budget, there, spilled)
        return _given_together(given) if are_several(model) else given()
    if are_several(model):
        return _planned_together(record, budget, levers, exact, beside, host_budget, there or device_of(model))
    recorded = record(levers is not None and bool(inexact(levers)))

    def made(recorded: Trace) -> Plan:
        return planned_here(
            recorded, budget, host_budget, there or device_of(model),
            lambda budget, limit: make_plan(
                recorded, budget, levers=levers, exact=exact, beside=beside or (), host_budget=limit
            ),
            0 if there is None else in_host_bytes(model), spilled,
        )  # fmt: skip

    try:
        return recorded, made(recorded)
    except BudgetInfeasible as error:
        may_lower = any(each.lowers_floor for each in allowed(beside or ()))
        hopeless = error.budget_bytes <= sum(recorded.static_bytes.values()) and not may_lower
        if levers is not None or (exact and hopeless):
            raise  # what is there before the step is too much already
        recorded = record(True)  # where that is so too: the least that is named is the least
        return recorded, made(recorded)


def _given_together(given: Callable[[], tuple[Trace, Plan]]) -> tuple[Trace, Plan]:
    """What `given` says in all processes: each looks at what a plan that is there already means for its own step."""
    meeting = Meeting("fit")
    try:
        recorded, made = given()
    except Exception as error:
        meeting.left({"error": str(error) if isinstance(error, TightfitError) else f"{type(error).__name__}: {error}"})
        raise
    for rank, other in enumerate(meeting.gathered({"peak": made.peak_bytes})):
        if other is None or "error" in other:
            raise PlanMismatch(
                f"the plan that was given is none for rank {rank}: {(other or {}).get('error', 'another rank failed')}"
            )
    return recorded, made


def _given(
    record: Callable[[bool], Trace],
    plan: Plan,
    model: nn.Module,
    host_budget: int | None,
    there: torch.device | None,
    spilled: bool,
) -> tuple[Trace, Plan]:
    recorded = record(bool(plan.inexact) or plan.tiling is not None)
    moved = rebased(plan, recorded)

    def taken(budget: str | int, limit: int | None) -> Plan:
        budget_bytes = parse_bytes(budget)
        of_process = f"that is what this process may take of {shared_place(device)}"
        of_machine = "that is what this machine, or the limit of its control group, leaves"
        fits_asked = moved.peak_bytes <= moved.budget_bytes  # it is a limit of this process that it does not keep
        sizes = [("of this step", moved.peak_bytes, budget_bytes, "budget", of_process if fits_asked else "")]
        if limit is not None:
            waiting = sum(host_bytes(recorded, moved).values())
            sizes.append(("in host memory", waiting, limit, "host budget", of_machine if host_budget is None else ""))
        for where, taken_bytes, most_bytes, what, why in sizes:
            if taken_bytes > most_bytes:
                takes, most = format_apart(taken_bytes, most_bytes)
                said = f"the plan that was given takes {takes} {where}, and may take {most}"
                if why:
                    raise PlanMismatch(f"{said}: {why}; raise that limit, or make the plan anew, for less")
                raise PlanMismatch(
                    f"{said}: the batch, the optimizer or what else lives in the step is larger than that which it was "
                    f"made for; make the plan anew, of this step, or raise the {what}"
                )
        return dataclasses.replace(moved, budget_bytes=budget_bytes, host_budget_bytes=limit)

    device, held_bytes = there or device_of(model), 0 if there is None else in_host_bytes(model)
    return recorded, planned_here(recorded, moved.budget_bytes, host_budget, device, taken, held_bytes, spilled)


#: How often the rank that plans is asked for less, where its plan takes more on another rank.
_ROUNDS = 6


def _planned_together(
    record: Callable[[bool], Trace],
    budget: str | int,
    levers: Collection[Lever] | None,
    exact: bool,
    beside: Collection[Lever] | None,
    host_budget: int | None,
    device: torch.device,
) -> tuple[Trace, Plan]:
    def planned_text(asked: int) -> str:
        return dumps(
            make_plan(recorded, asked, levers=levers, exact=exact, beside=beside or (), host_budget=host_budget)
        )

    meeting = Meeting("fit")
    try:
        recorded = record(False)
    except Exception as error:
        meeting.left({"error": f"{type(error).__name__}: {error}"})
        raise
    own_peak = simulate(recorded).peak_bytes
    all_said = meeting.gathered(
        {
            "peak": own_peak, "budget": str(budget), "units": [unit.path for unit in recorded.units],
            "share": share_of_device(device),
        }
    )  # fmt: skip
    for rank, other in enumerate(all_said):
        if other is None or "error" in other:
            raise Unsupported(
                f"rank {rank} cannot record its step: {(other or {}).get('error', 'another rank failed')}"
            )
        if other["units"] != all_said[0]["units"]:
            raise PlanMismatch(f"rank {rank} has other units than rank 0: all must build the same model")
    budgets = [other["budget"] for other in all_said]
    peaks = [other["peak"] for other in all_said]
    leader = peaks.index(max(peaks))
    if len(set(budgets)) == 1:
        budget_bytes = parse_bytes(budget, whole_bytes=peaks[leader])
    elif any("%" in each for each in budgets):
        raise InvalidInput(f"the ranks ask for different budgets ({', '.join(budgets)}): give all the same, or bytes")
    else:  # one plan for all has to hold the least of them
        budget_bytes = min(map(parse_bytes, budgets))
    shares = [other["share"] for other in all_said]
    least = min((share for share in shares if share is not None), default=budget_bytes)
    if least < budget_bytes:
        budget_bytes = lowered(budget_bytes, least, f"rank {shares.index(least)}", "its card", stacklevel=4)
    target = budget_bytes
    for turn in range(_ROUNDS):
        asked = target
        text = meeting.published(leader, lambda: planned_text(asked))  # noqa: B023  # at once
        theirs = loads(Plan, text, f"the plan of rank {leader}")
        mine = dataclasses.replace(theirs, trace_digest=recorded.digest, budget_bytes=budget_bytes)
        try:
            line = simulate(recorded, mine)
            said: dict[str, Any] = {"peak": line.peak_bytes}
        except TightfitError as error:
            said = {"error": str(error)}
        reached = meeting.gathered(said)
        for rank, other in enumerate(reached):
            if "error" in other:
                raise PlanMismatch(f"the plan of rank {leader} is none for the step of rank {rank}: {other['error']}")
        most = max(other["peak"] for other in reached)
        if most <= budget_bytes:
            return recorded, dataclasses.replace(mine, peak_bytes=line.peak_bytes, unplanned_peak_bytes=own_peak)
        target -= (most - budget_bytes) << turn  # steps that differ a little (routing), or shards of another size
    rank = next(r for r, other in enumerate(reached) if other["peak"] == most)
    raise BudgetInfeasible(
        budget_bytes, most, (f"that is what rank {rank} takes under the plan of rank {leader}, whose step differs",)
    )
