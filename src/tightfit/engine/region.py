"""One region of a custom model, marked by hand: `checkpoint(function, *args, keep=...)`.

Without `keep` a region holds its inputs and runs whole again in backward. With `keep` it holds the outputs of
the named ops and reruns only what backward needs besides: the first call of a region learns its program, calls
after that follow the recipe.

Invariant: usable wherever `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)` is, with the same
gradients. Refused: a `keep` that names no op of the region (`InvalidInput`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeVar

import torch

from tightfit.core import InvalidInput, Program, Unsupported
from tightfit.engine.compiled import run_again
from tightfit.engine.frame import Frame, FramePlan, Stats, is_active
from tightfit.plan.program import recipe
from tightfit.step import refuse_compiled, tensors_in
from tightfit.trace import ProgramRecorder

T = TypeVar("T")
Keep = Collection[str] | Callable[[str], bool]

#: What regions with `keep` have learnt: (code, keep, kinds of arguments) -> plan, or None where none is possible.
_learnt: dict[Any, FramePlan | None] = {}
_LEARNT_AT_MOST = 256

region_stats = Stats()


def checkpoint(function: Callable[..., T], *args: Any, keep: Keep | None = None, **kwargs: Any) -> T:
    """`function(*args, **kwargs)`, holding only its inputs and what `keep` names until backward.

    `keep`: op names (`"aten.mm.default"`, `"aten.mm"` or `"mm"`), or a predicate on the full name. Raises
    `InvalidInput` when it matches no op; in backward `ReplayDiverged` when the function does not do the same
    twice. In compiled code the compiler does it, by names only, and none of them need match.
    """
    if torch.compiler.is_compiling():
        if callable(keep):
            refuse_compiled("a compiled region has a function for keep, not the names of ops")
        names = {keep} if isinstance(keep, str) else keep
        return run_again(function, args, kwargs, names)  # type: ignore[arg-type]
    if not torch.is_grad_enabled() or is_active():
        return function(*args, **kwargs)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    plan = None
    module = function if isinstance(function, torch.nn.Module) else getattr(function, "__self__", None)
    owner = module if isinstance(module, torch.nn.Module) else None
    if keep is not None:
        key = _key(function, args, kwargs, keep)
        if key not in _learnt:
            program, first = _learn(name, function, args, kwargs, owner)
            if len(_learnt) >= _LEARNT_AT_MOST:
                _learnt.pop(next(iter(_learnt)))
            _learnt[key] = _plan_for(program, keep, name)
            return first
        plan = _learnt[key]
    out: T = Frame(name, function, args, kwargs, plan, region_stats, owner).run()
    return out


def _key(function: Callable[..., Any], args: Any, kwargs: Any, keep: Keep) -> Any:
    code = getattr(function, "__code__", None) or getattr(type(function), "forward", type(function))
    chosen = keep if callable(keep) else frozenset([keep] if isinstance(keep, str) else keep)
    kinds = tuple((t.dim(), t.dtype, t.device, t.requires_grad) for t in tensors_in((args, kwargs)))
    training = getattr(function, "training", None)
    return code, chosen, kinds, training, torch.is_autocast_enabled("cpu"), id(getattr(function, "__self__", None))


def _learn(
    name: str, function: Callable[..., T], args: Any, kwargs: Any, owner: torch.nn.Module | None
) -> tuple[Program, T]:
    """Run the region whole, recording its program on the side."""
    frame = Frame(name, function, args, kwargs, None, region_stats, owner)
    with ProgramRecorder() as recorder:
        frame.observe = recorder.saw
        out = frame.run()
    return recorder.program(), out


def _plan_for(program: Program, keep: Keep, name: str) -> FramePlan | None:
    if callable(keep):
        matches = keep
    else:
        names = {keep} if isinstance(keep, str) else set(keep)

        def matches(op: str) -> bool:
            full = op.rpartition(".")[0]
            return bool(names & {op, full, full.rpartition(".")[2]})

    chosen = [step for step in program.steps if matches(step.name)]
    if not chosen:
        raise InvalidInput(
            f"keep matches no op of {name}; its ops are {', '.join(sorted({s.name for s in program.steps}))}"
        )
    kept = frozenset(
        v for step in chosen for v in (*step.writes, *(o for o in step.outputs if o is not None and o >= 0))
    )
    try:
        return FramePlan.of(program, recipe(program, kept))
    except Unsupported:
        return None
