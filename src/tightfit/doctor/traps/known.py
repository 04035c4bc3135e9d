"""Every trap, and how its probe is run.

Invariant: a probe leaves the random state and what is printed as they were. That it cannot run is never taken for a
clean bill: it is `CANNOT_TELL`, with the reason.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator

import torch

from tightfit.doctor.traps.four_bit import FOUR_BIT_CPU_AFTER_EVAL
from tightfit.doctor.traps.peaks import FOREACH_TEMPORARIES, LOGITS_OWN_THE_PEAK
from tightfit.doctor.traps.random_state import COMPILER_BUDGET_WITH_DROPOUT, RANDOM_STATE_NOT_PRESERVED
from tightfit.doctor.traps.reentrant import INPUT_GRADIENT_HOOK_LEFT, MISSING_INPUT_GRADIENTS, REENTRANT_BY_DEFAULT
from tightfit.doctor.traps.switches import OFF_IN_EVAL, TRL_OVERRIDES_THE_PLAN
from tightfit.doctor.traps.trap import Seen, Trap, cannot_tell
from tightfit.doctor.traps.use_cache import USE_CACHE


@contextlib.contextmanager
def _alone() -> Iterator[list[str]]:
    """A probe's surroundings: the random state is put back, nothing is printed, warnings are collected."""
    said: list[str] = []
    disabled = logging.root.manager.disable
    out = io.StringIO()
    with (
        torch.random.fork_rng(devices=()),
        warnings.catch_warnings(record=True) as caught,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
    ):
        warnings.simplefilter("always")
        logging.disable(logging.CRITICAL)
        try:
            yield said
        finally:
            logging.disable(disabled)
            said += [str(each.message) for each in caught]


TRAPS: tuple[Trap, ...] = (
    REENTRANT_BY_DEFAULT,
    MISSING_INPUT_GRADIENTS,
    INPUT_GRADIENT_HOOK_LEFT,
    USE_CACHE,
    RANDOM_STATE_NOT_PRESERVED,
    COMPILER_BUDGET_WITH_DROPOUT,
    FOUR_BIT_CPU_AFTER_EVAL,
    TRL_OVERRIDES_THE_PLAN,
    OFF_IN_EVAL,
    LOGITS_OWN_THE_PEAK,
    FOREACH_TEMPORARIES,
)


def probed(trap: Trap, *, deep: bool = False) -> Seen:
    """What the trap's probe saw in the installed versions; that it could not run is `CANNOT_TELL`."""
    lacking = [package for package in trap.packages if importlib.util.find_spec(package) is None]
    if lacking:
        return cannot_tell(f"needs the package {lacking[0]}, which is not installed")
    probe = trap.deep if deep and trap.deep is not None else trap.probe
    try:
        with _alone():
            return probe()
    except Exception as error:  # whatever other versions of these packages raise
        first_line = (str(error).splitlines() or [""])[0]
        return cannot_tell(f"the probe could not run here ({type(error).__name__}: {first_line})")
