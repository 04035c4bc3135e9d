"""One region of a custom model, marked by hand: `checkpoint(function, *args, keep=...)`.

Without `keep` a region holds its inputs and runs whole again in backward. With `keep` it holds the outputs of the named
ops and reruns only what backward needs besides. The first call of a region learns its program; later calls follow the
recipe made from it.

Invariant: it can be used wherever `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)` can, with the same
gradients. Refused: a `keep` that names no op of the region (`InvalidInput`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch
import torch.utils.checkpoint

from tightfit import accelerator
from tightfit.core import InvalidInput, Program, Unsupported
from tightfit.engine.ambient import called_in, is_active
from tightfit.engine.compiled import run_again
from tightfit.engine.frame import Frame
from tightfit.engine.frame_plan import FramePlan, Stats
from tightfit.plan.program import recipe
from tightfit.step.patches import refuse_compiled
from tightfit.step.run import tensors_in
from tightfit.trace.programs import ProgramRecorder

T = TypeVar("T")
Keep = Collection[str] | Callable[[str], bool]

#: What regions with `keep` have learnt: (code, keep, kinds of arguments) -> plan, or None where none is possible.
_learnt: dict[Any, FramePlan | None] = {}
_LEARNT_AT_MOST = 256

region_stats = Stats()


def checkpoint(
    function: Callable[..., T],
    *args: Any,
    keep: Keep | None = None,
    use_reentrant: bool | None = False,
    preserve_rng_state: bool = True,
    determinism_check: str = "default",
    debug: bool = False,
    early_stop: bool = True,
    context_fn: Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]] | None = None,
    **kwargs: Any,
) -> T:
    """`function(*args, **kwargs)`, holding only its inputs and what `keep` names until backward.

    `keep`: ops (`torch.ops.aten.mm`), their names (`"aten.mm.default"`, `"aten.mm"`, `"mm"`), or a predicate on the
    full name. Raises `InvalidInput` when it matches no op; in backward `ReplayDiverged` when the function does not do
    the same twice. In compiled code the compiler does it, by names only, and none of them need match.

    The other keywords are those of `torch.utils.checkpoint.checkpoint`, and are not passed to `function`:

    - `use_reentrant`: `False` or `None`. `True` is `Unsupported`.
    - `preserve_rng_state`: either. Random numbers are always the forward's; with others the gradients would be wrong.
    - `determinism_check`: `"default"`. Every replay is compared bit for bit, so `"none"` is `Unsupported`.
    - `debug`: an error in backward also says where the region was called.
    - `early_stop`: `False` has a replay run the function to its end, so that what comes last in it happens again; with
      `keep`, which runs single ops again and not the function, there is no end to run to.
    - `context_fn`: gives two context managers, entered around the forward and around the replay; a region inside of
      another is part of that one's forward and replay, and enters its first. `Unsupported` in compiled code, and where
      they are torch's selective checkpointing: that is `keep`. Not together with `keep` (`InvalidInput`).

    Within `torch.func.jvp`, `jacfwd` and `vmap` the function runs as it is: a tensor there has no storage of its own
    that could be dropped.

    `torch.utils.checkpoint.set_checkpoint_early_stop` and `set_checkpoint_debug_enabled` go over the keywords, as they
    do there.
    """
    _refuse(use_reentrant, determinism_check, keep is not None and context_fn is not None)
    if torch.compiler.is_compiling():
        if callable(keep):
            refuse_compiled("a compiled region has a function for keep, not the names of ops")
        if context_fn is not None:
            refuse_compiled("a compiled region has a context_fn")
        names = {keep} if isinstance(keep, str) else keep
        return run_again(function, args, kwargs, names)  # type: ignore[arg-type]
    keep = None if keep is None else _asked_to_keep(keep)
    if not torch.is_grad_enabled() or _is_transformed():
        return function(*args, **kwargs)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    if is_active():
        inner: T = called_in(_contexts(context_fn)[0], name, function, args, kwargs)
        return inner
    if _switched("_checkpoint_debug_enabled", debug):
        caller = sys._getframe(1)
        name = f"{name} (called in {caller.f_code.co_filename}, line {caller.f_lineno})"
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
    frame = Frame(name, function, args, kwargs, plan, region_stats, owner)
    frame.contexts = _contexts(context_fn)
    frame.stops_early = _switched("_enable_checkpoint_early_stop", early_stop)
    out: T = frame.run()
    return out


def _refuse(use_reentrant: bool | None, determinism_check: str, both: bool) -> None:
    """Raise for keywords that ask for what this `checkpoint` cannot do."""
    if use_reentrant:
        raise Unsupported(
            "use_reentrant=True runs backward inside of backward and loses hooks and keyword arguments; tightfit's "
            "regions are the other way: leave it out, or say use_reentrant=False"
        )
    if determinism_check == "none":
        raise Unsupported(
            'determinism_check="none" would let a replay that differs pass for the gradient; tightfit compares every '
            'replay: leave it out, or say determinism_check="default"'
        )
    if determinism_check != "default":
        raise InvalidInput(f'determinism_check={determinism_check!r} is neither "default" nor "none"')
    if both:
        raise InvalidInput("keep and context_fn are two ways to treat the ops of a region: give one of them")


def _is_transformed() -> bool:
    """Is this within a transform of `torch.func` whose tensors have no storage?"""
    functorch = torch._C._functorch
    kinds = {functorch.TransformType.Jvp, functorch.TransformType.Vmap}
    return any(each.key() in kinds for each in functorch.get_interpreter_stack() or ())


def _asked_to_keep(keep: Any) -> Keep:
    """Ops by name, as `torch.ops.aten.mm` and its overloads have them. Raises `InvalidInput` for what is none."""
    ops = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
    if isinstance(keep, (str, *ops)):
        return {str(keep)}
    if isinstance(keep, Collection) and all(isinstance(name, (str, *ops)) for name in keep):
        return {str(name) for name in keep}
    if callable(keep):
        return cast(Keep, keep)
    raise InvalidInput(
        f"keep={keep!r} says nothing of ops: give names, as in keep=['mm'], or a function of an op's full name; an "
        "argument of the function that is called keep has to be bound to it first, by functools.partial"
    )


def _switched(name: str, said: bool) -> bool:
    """The value of a keyword: that of torch's switch for all regions where it is set, else the keyword's own. Some
    torch releases have no such switch."""
    switch = getattr(torch.utils.checkpoint, name, None)
    return said if switch is None else bool(switch)


def _contexts(
    context_fn: Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]] | None,
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    if context_fn is None:
        return nullcontext(), nullcontext()
    found = context_fn() if callable(context_fn) else None
    if not (isinstance(found, (tuple, list)) and len(found) == 2 and all(map(_is_context, found))):
        raise InvalidInput(
            "expected of context_fn a function of no arguments that gives two context managers, for the forward and "
            f"for the replay, found {type(found).__name__ if callable(context_fn) else repr(context_fn)}"
        )
    forward, replay = found
    if any(kind.__module__ == "torch.utils.checkpoint" for kind in (*type(forward).__mro__, *type(replay).__mro__)):
        raise Unsupported(
            "context_fn is torch's selective checkpointing, which hides ops from the comparison of the replay: name "
            'the ops whose results are to be held with keep, as in keep=["mm"]'
        )
    return forward, replay


def _is_context(found: Any) -> bool:
    return hasattr(found, "__enter__") and hasattr(found, "__exit__")


def _key(function: Callable[..., Any], args: Any, kwargs: Any, keep: Keep) -> Any:
    code = getattr(function, "__code__", None) or getattr(type(function), "forward", type(function))
    chosen = keep if callable(keep) else frozenset([keep] if isinstance(keep, str) else keep)
    tensors = tensors_in((args, kwargs))
    kinds = tuple((t.dim(), t.dtype, t.device, t.requires_grad) for t in tensors)
    casts = accelerator.autocast_states(t.device for t in tensors)
    training = getattr(function, "training", None)
    return code, chosen, kinds, training, casts, id(getattr(function, "__self__", None))


def _learn(
    name: str, function: Callable[..., T], args: Any, kwargs: Any, owner: torch.nn.Module | None
) -> tuple[Program, T]:
    """Run the region, which is to be replayed whole this time, and record its program on the side."""
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
