"""What limits that are set outside of tightfit leave a plan here.

Idea: a budget says what a step may take, and the process may be given less: a share of the card
(`set_per_process_memory_fraction`), a control group's limit of host memory, or simply a machine that has no more. What
a plan has wait in host memory must find room in this machine; what waits in a file need not.

Invariant: a budget is only ever lowered, and a line says so. A host budget that the user gave is the user's own word: a
plan that asks for more than the machine leaves is made, and a line says so. Refused: a plan that nobody limited and
that the machine has no host memory for, if no other is found (`BudgetInfeasible`, which says whose limit it was).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from tightfit import accelerator
from tightfit.core import BudgetInfeasible, Category, InvalidInput, Plan, Trace, format_bytes, parse_bytes
from tightfit.engine.offload import held_bytes
from tightfit.plan import simulate
from tightfit.plan.account import host_bytes

__all__ = [
    "lacking_in_host", "lowered", "planned_here", "room_in_host", "share_of_device", "shared_place", "tell_of_host",
    "within_device",
]  # fmt: skip

#: What lies on the device before a step, in the process already.
_THERE = (Category.PARAMETERS, Category.QUANTISED, Category.BUFFERS)


def room_in_host() -> int | None:
    """Bytes that this process may still take of this machine's memory, for what is to wait there. None: the system does
    not say. What pools hold counts as free: a plan that is made anew takes the place of the one that filled them."""
    free_bytes = accelerator.free_bytes(accelerator.HOST)
    return None if free_bytes is None else free_bytes + held_bytes()


def planned_here(
    trace: Trace,
    budget: str | int,
    host_budget: int | None,
    device: torch.device,
    make: Callable[[str | int, int | None], Plan],
    held_bytes: int = 0,
    spilled: bool = False,
) -> Plan:
    """The plan of `trace` that `make(budget, host_budget)` gives, within the limits that are set here. `held_bytes`: of
    what may wait, so much is in host memory already. `spilled`: what waits does so in a file. Raises what `make`
    does."""
    if (share_bytes := share_of_device(device)) is not None:
        asked_bytes = parse_bytes(budget, whole_bytes=simulate(trace).peak_bytes)
        if (within_bytes := within_device(asked_bytes, device, share_bytes)) < asked_bytes:
            budget = within_bytes
    made = make(budget, host_budget)
    left = lacking_in_host(trace, made, device, held_bytes, spilled)
    if left is None:
        return made
    if host_budget is not None:
        tell_of_host(trace, made, left, stacklevel=5)
        return made
    try:
        return make(made.budget_bytes, left)
    except BudgetInfeasible as error:
        why = (
            f"no host budget was given: {format_bytes(left)} is what this machine, or the limit of its control group, "
            "leaves"
        )
        raise BudgetInfeasible(
            error.budget_bytes, error.least_bytes, (why, *error.advice),
            host_budget_bytes=error.host_budget_bytes, host_bytes=error.host_bytes,
        ) from None  # fmt: skip


def lacking_in_host(
    trace: Trace, made: Plan, device: torch.device, held_bytes: int = 0, spilled: bool = False
) -> int | None:
    """Bytes of this machine's memory that there are for what `made` has wait there, where they are too few. None: they
    are enough, or the system does not say. `held_bytes`, `spilled`: as in `planned_here`."""
    waiting = 0 if spilled else sum(host_bytes(trace, made).values())
    left = _beside_step(trace, made.budget_bytes, device) if waiting else None
    left = None if left is None else left + held_bytes
    return None if left is None or waiting <= left else left


def tell_of_host(trace: Trace, made: Plan, left_bytes: int, *, stacklevel: int) -> None:
    """Warn that `made` has more wait in host memory than there is, since its host budget allows it."""
    waiting = sum(host_bytes(trace, made).values())
    warnings.warn(
        f"the plan has {format_bytes(waiting)} wait in host memory, as its host budget allows, and this machine "
        f"leaves {format_bytes(left_bytes)}: lower the host budget",
        stacklevel=stacklevel,
    )


def share_of_device(device: torch.device) -> int | None:
    """What this process may take of the device, in bytes: its share of a card, or what its control groups leave it of
    the host. None: nobody says, or there is no such limit."""
    if accelerator.is_card(device):
        return accelerator.limit_bytes(device)
    limit_bytes = accelerator.limit_bytes(device) if accelerator.is_host(device) else None
    return None if limit_bytes == accelerator.host_memory_bytes() else limit_bytes


def within_device(asked_bytes: int, device: torch.device, share_bytes: int | None = None) -> int:
    """A budget, or what this process may take of the device where that is less, which a warning says. `share_bytes`:
    that, where it was asked for already."""
    limit_bytes = share_of_device(device) if share_bytes is None else share_bytes
    if limit_bytes is None or asked_bytes <= limit_bytes:
        return asked_bytes
    if limit_bytes <= 0:
        raise InvalidInput(
            f"a budget of {format_bytes(asked_bytes)} was asked for, and this process may take nothing of "
            f"{shared_place(device)}: raise that limit"
        )
    return lowered(asked_bytes, limit_bytes, "this process", shared_place(device), stacklevel=6)


def shared_place(device: torch.device) -> str:
    """Of what `share_of_device` is a share, in words."""
    return accelerator.name_of(device) if accelerator.is_card(device) else "host memory, by its control group's limit"


def lowered(asked_bytes: int, limit_bytes: int, who: str, where: str, *, stacklevel: int) -> int:
    """The budget where `who` may take less of what is called `where` than was asked for, which a warning says."""
    warnings.warn(
        f"a budget of {format_bytes(asked_bytes)} was asked for, and {who} may take {format_bytes(limit_bytes)} of "
        f"{where}: planned for that",
        stacklevel=stacklevel,
    )
    return limit_bytes


def _beside_step(trace: Trace, budget_bytes: int, device: torch.device) -> int | None:
    """What is left of host memory beside the step itself, which runs there too where the host is the device."""
    room_bytes = room_in_host()
    if room_bytes is None or accelerator.is_card(device):
        return room_bytes
    there = sum(trace.static_bytes.get(category.value, 0) for category in _THERE)
    return max(0, room_bytes - max(0, budget_bytes - there))
