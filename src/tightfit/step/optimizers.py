"""Step an optimizer for some of its parameters at a time.

An optimizer steps the parameters that its groups list. So a group that lists a few of them for a moment steps these
few. Whether that gives the same bits depends on the optimizer: one that looks at all parameters at once, or counts its
steps in the group, would take another step. `refusal` tries it instead of assuming it. A trial cannot show everything
(a norm that is only clipped where it is large), so only torch's own optimizers are tried (`not_torchs_own`).

Invariant: outside a step the groups are what they were, the same objects. Hooks of the optimizer run once a step.
Refused: other packages' optimizers, those that need a closure, and those whose bits differ.
"""

from __future__ import annotations

import contextlib
import itertools
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch.optim import Optimizer

from tightfit.accelerator import HOST
from tightfit.step.geometry import is_dense
from tightfit.step.modes import modes_off
from tightfit.step.parallel import local_of

__all__ = [
    "MARK", "Around", "Cut", "Part", "around_parts", "bare", "bytes_of", "chunks", "close_door", "cut_for", "door",
    "has_gradients", "is_movable", "movable_state", "narrowed", "not_torchs_own", "refusal", "replaced_step",
    "step_parts", "stepping_in_chunks",
]  # fmt: skip


#: What tightfit puts in the place of a step has it.
MARK = "__tightfit__"


class Part(NamedTuple):
    """Parameters of one group that are stepped together, or one that is stepped by slices of its rows."""

    group: dict[str, Any]
    parameters: list[torch.Tensor]
    slices: int = 1


#: Smaller parameters are stepped whole: nothing is won, and a slice must not be a single number.
_LEAST_SLICED = 256


class Cut(NamedTuple):
    """How much is stepped at once."""

    limit_bytes: int
    sliced: bool  # a parameter that is larger is stepped by slices

    def of(self, group: dict[str, Any], parameter: torch.Tensor) -> Part:
        """The step of one parameter."""
        slices = 1
        if self.sliced and parameter.dim() and parameter.numel() >= _LEAST_SLICED:
            slices = min(-(-bytes_of(parameter) // max(1, self.limit_bytes)), _most_slices(parameter))
        return Part(group, [parameter], max(1, slices))


def bare(optimizer: Any) -> Optimizer:
    """The torch optimizer inside accelerate's wrapper."""
    inside: Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inside


def bytes_of(parameter: torch.Tensor) -> int:
    local = local_of(parameter)
    return local.numel() * local.element_size()


#: Into so many parts a step is cut, about. With more of them the temporaries are less, and the calls more.
_PARTS = 32


def cut_for(optimizer: Optimizer, sliced: bool) -> Cut:
    """Parts so small that their temporaries are little beside the parameters; not sliced, as large as the largest
    parameter, below which they cannot be."""
    sizes = [bytes_of(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    return Cut(max(1, sum(sizes) // _PARTS) if sliced else max(sizes, default=0), sliced)


def chunks(optimizer: Optimizer, cut: Cut) -> list[Part]:
    """The parameters that are stepped, in order, in parts of one group and of about the same bytes."""
    parts: list[Part] = []
    for group in optimizer.param_groups:
        filled_bytes = None
        for parameter in group["params"]:
            if not parameter.requires_grad and parameter.grad is None:  # one with a gradient is stepped by torch too
                continue
            size_bytes = bytes_of(parameter)
            if cut.sliced and size_bytes > cut.limit_bytes:
                parts.append(cut.of(group, parameter))
                filled_bytes = None
                continue
            if filled_bytes is None or filled_bytes + size_bytes > cut.limit_bytes:
                parts.append(Part(group, []))
                filled_bytes = 0
            parts[-1].parameters.append(parameter)
            filled_bytes += size_bytes
    return parts


@contextlib.contextmanager
def narrowed(optimizer: Optimizer, part: Part) -> Iterator[None]:
    """The optimizer lists only `part` meanwhile."""
    groups, parameters = optimizer.param_groups, part.group["params"]
    optimizer.param_groups = [part.group]
    part.group["params"] = part.parameters
    try:
        yield
    finally:
        part.group["params"] = parameters
        optimizer.param_groups = groups


#: Attribute of an optimizer: what is around the step of a part. An attribute, so that it goes with the optimizer.
_AROUND = "_tightfit_around"
_DOOR = "_tightfit_door"


def is_movable(value: Any) -> bool:
    """Is it state that is worth moving: a tensor of more than one number, without gaps? State that was loaded may lie
    in a storage with more beside it."""
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and value.numel() > 1 and is_dense(value)


def movable_state(optimizer: Optimizer, parameter: torch.Tensor) -> dict[Any, torch.Tensor]:
    """What the optimizer keeps of `parameter` that is worth moving."""
    return {name: value for name, value in optimizer.state.get(parameter, {}).items() if is_movable(value)}


class Around(Protocol):
    """Has what the optimizer's step reads elsewhere, and brings it for the step of each part."""

    def there(self, part: Part, following: Part | None) -> contextlib.AbstractContextManager[None]:
        """Open around the step of `part`. `following`: the part that is stepped next; None: it is not known."""

    def over(self) -> None:
        """All parts were stepped, or one could not be."""


@contextlib.contextmanager
def around_parts(optimizer: Optimizer, around: Around) -> Iterator[None]:
    """`around` brings what the steps of parts read meanwhile."""
    listed = vars(optimizer).setdefault(_AROUND, [])
    listed.append(around)
    try:
        yield
    finally:
        listed.remove(around)
        if not listed:
            delattr(optimizer, _AROUND)


def step_parts(optimizer: Optimizer, parts: Iterable[Part]) -> None:
    """Step each part in its turn, without the optimizer's hooks."""
    around = vars(optimizer).get(_AROUND, ())
    step: Any = type(optimizer).step
    if getattr(step, "hooked", False):  # torch wraps each class's step so that hooks run
        step = step.__wrapped__
    turns = list(parts)
    with contextlib.ExitStack() as whole:
        for each in around:
            whole.callback(each.over)
        for place, part in enumerate(turns):
            following = next(filter(has_gradients, turns[place + 1 :]), None)
            with contextlib.ExitStack() as stack:
                for each in around:
                    stack.enter_context(each.there(part, following))
                if part.slices > 1 and _can_be_sliced(part.parameters[0]):
                    _step_slices(optimizer, part, step)
                else:
                    with narrowed(optimizer, part):
                        step(optimizer)


def has_gradients(part: Part) -> bool:
    """Is anything of `part` stepped?"""
    return any(parameter.grad is not None for parameter in part.parameters)


def _can_be_sliced(parameter: torch.Tensor) -> bool:
    gradient = parameter.grad
    return gradient is not None and gradient.layout is torch.strided and local_of(parameter) is parameter


#: The first step cuts a parameter into so many times more slices: their state is twice their size with Adam, and is
#: there beside what a slice has for a while in any step. Rounding may make them larger than their share.
_FIRST_FINER = 6


def _step_slices(optimizer: Optimizer, part: Part, step: Callable[[Optimizer], Any]) -> None:
    """Step views of a parameter's rows in turn. Each has the views of the state that is as large as the parameter, and
    its own copy of the rest, of which the last one's is kept."""
    (parameter,) = part.parameters
    gradient = parameter.grad
    assert gradient is not None
    state = optimizer.state
    whole: dict[Any, Any] = state.get(parameter, {})
    # the first step makes the slices' state beside the whole parameter's, so its slices are smaller
    slices = part.slices if whole else max(part.slices, min(_most_slices(parameter), _FIRST_FINER * part.slices))
    made: dict[Any, Any] = {}
    for place in _places(tuple(parameter.shape), slices):
        piece = parameter.detach()[place].requires_grad_()
        piece.grad = gradient[place]
        for name, value in whole.items():
            state[piece][name] = _piece_of(value, parameter, place)
        try:
            with narrowed(optimizer, Part(part.group, [piece])):
                step(optimizer)
            for name, value in state[piece].items():
                if name in whole and _is_as_large(whole[name], parameter):
                    continue
                if not isinstance(value, torch.Tensor) or value.shape != piece.shape or value.numel() == 1:
                    made[name] = value
                    continue
                if name not in made:
                    made[name] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
                made[name][place].copy_(value)
        finally:
            state.pop(piece, None)
    for name, value in made.items():
        if isinstance(value, torch.Tensor) and isinstance(whole.get(name), torch.Tensor):
            whole[name].copy_(value)
        else:
            state[parameter][name] = value


def _most_slices(parameter: torch.Tensor) -> int:
    """Into so many slices a parameter can be cut, none of which is a single number: its state would look like a
    count."""
    lines: int = parameter.numel() // max(1, parameter.shape[-1])
    if parameter.dim() > 1 and parameter.shape[-1] > 1:
        return lines
    return parameter.shape[0] if parameter.numel() > parameter.shape[0] else parameter.shape[0] // 2


def _places(shape: tuple[int, ...], slices: int) -> Iterator[tuple[slice, ...]]:
    """Where about `slices` slices of a tensor lie: rows of its first dimension, and where these are too few (experts
    that are stacked) rows of the next one in each. They have as many dimensions as the tensor."""
    rows = shape[0]
    if slices <= rows or len(shape) == 1:
        for start, end in itertools.pairwise(rows * i // slices for i in range(slices + 1)):
            yield (slice(start, end),)
        return
    for row in range(rows):
        for inner in _places(shape[1:], -(-slices // rows)):
            yield (slice(row, row + 1), *inner)


def _is_as_large(value: Any, parameter: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.numel() > 1


def _piece_of(value: Any, parameter: torch.Tensor, place: tuple[slice, ...]) -> Any:
    if _is_as_large(value, parameter):
        return value[place]
    return value.clone() if isinstance(value, torch.Tensor) else value


class _Door:
    """What stands in for `optimizer.step` and does `run` instead, or the step itself where `run` is none.

    A learning-rate scheduler and others may have wrapped the step before, or wrap it meanwhile. Either way they see
    their step, and the door stays where it is until it is the outermost again.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.runs: list[Callable[[], None]] = []  # the last is done
        self.users = 0
        before = optimizer.step
        self.own = vars(optimizer).get("step")

        def planned(self_: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            self.runs[-1]()
            return loss

        hooked: Any = Optimizer.profile_hook_step(planned)  # type: ignore[arg-type]  # it wants a step without a result

        def step(self_: Optimizer, *args: Any, **kwargs: Any) -> Any:
            if not self.runs:
                return before(*args, **kwargs)
            self_._opt_called = True  # type: ignore[attr-defined]  # what a scheduler's wrapper notes
            return hooked(self_, *args, **kwargs)

        for name, value in vars(before.__func__ if isinstance(before, types.MethodType) else before).items():
            setattr(step, name, value)  # by these a scheduler knows its own wrapper
        step.hooked = True  # type: ignore[attr-defined]
        setattr(step, MARK, True)
        self.bound = types.MethodType(step, optimizer)
        optimizer.step = self.bound  # type: ignore[method-assign]


@contextlib.contextmanager
def door(optimizer: Optimizer) -> Iterator[_Door]:
    """A place meanwhile where `replaced_step` can act, inside whatever wraps `optimizer.step` from now on."""
    found: _Door | None = vars(optimizer).get(_DOOR)
    if found is None:
        found = _Door(optimizer)
        setattr(optimizer, _DOOR, found)
    found.users += 1
    try:
        yield found
    finally:
        found.users -= 1
        close_door(optimizer)


def close_door(optimizer: Optimizer) -> None:
    """Take the door off, if nobody uses it and nothing is wrapped around it."""
    found: _Door | None = vars(optimizer).get(_DOOR)
    if found is not None and not found.users and vars(optimizer).get("step") is found.bound:
        delattr(optimizer, _DOOR)
        if found.own is None:
            del optimizer.step
        else:
            optimizer.step = found.own  # type: ignore[method-assign]


@contextlib.contextmanager
def replaced_step(optimizer: Optimizer, run: Callable[[], None]) -> Iterator[None]:
    """`optimizer.step()` does `run` meanwhile: hooks once before and after it, closures first, as torch has it."""
    with door(optimizer) as found:
        found.runs.append(run)
        try:
            yield
        finally:
            found.runs.remove(run)


def stepping_in_chunks(optimizer: Optimizer, cut: Cut) -> contextlib.AbstractContextManager[None]:
    """`optimizer.step()` steps its `chunks` in turn meanwhile."""
    return replaced_step(optimizer, lambda: step_parts(optimizer, chunks(optimizer, cut)))


#: Of other dtypes torch's CPU kernels round the few numbers that fill no whole vector otherwise, and which these are
#: depends on where a slice ends.
_SLICED = (torch.float32, torch.float64)


def not_torchs_own(optimizer: Optimizer) -> str:
    """Why no trial can tell that the step of `optimizer` goes parameter by parameter; empty: it is one of torch's."""
    kind = type(optimizer)
    if not kind.__module__.startswith("torch.optim."):
        return (
            f"{kind.__module__}.{kind.__name__} is not torch's own: a trial on small tensors cannot show what its step "
            "does on others"
        )
    own = vars(optimizer).get("step")
    if own is not None and not any(getattr(own, mark, False) for mark in ("_wrapped_by_lr_sched", MARK)):
        return "its step() was replaced, and steps of some parameters would go past what replaced it"
    return ""


_TRIED_STEPS = 3
_TRIED_PARAMETERS = 4
_TRIED_SIZE = 37  # odd, so that a kernel's vectors do not end where slices do


def refusal(make: Any, groups: Sequence[dict[str, Any]], *, sliced: bool = False) -> str:
    """Why steps of one parameter at a time, or of slices of one, are not the whole step, bit for bit; empty: they are.

    It is tried: `make(groups)` twice on small real parameters, with as many dimensions and of the dtypes of those in
    `groups`, three steps each. `groups` has every other setting as the optimizer's own.
    """
    if sliced and any(p.dtype not in _SLICED for group in groups for p in group["params"]):
        return "in low precision a kernel may round the ends of what it is given otherwise"
    if sliced and any(group.get("fused") for group in groups):
        return "a fused kernel may round the ends of what it is given otherwise, and has no temporaries"
    try:
        # on real tensors, whatever mode the step itself is recorded in
        with modes_off(), torch.device(HOST), torch.random.fork_rng(devices=()):
            whole, single = (_tried(make, groups, slices) for slices in (0, 2 if sliced else 1))
            same = len(whole) == len(single) and all(_same(a, b) for a, b in zip(whole, single, strict=True))
    except Exception as error:  # whatever an optimizer raises here means that it cannot be tried
        return f"a step of some parameters cannot be tried ({type(error).__name__}: {str(error).splitlines()[0:1]})"
    return "" if same else "its step for some parameters at a time gives other bits than its step for all"


def _tried(make: Any, groups: Sequence[dict[str, Any]], slices: int) -> list[Any]:
    """Parameters, state and settings after a few steps on small copies, each parameter in `slices`; 0: whole steps."""
    generator = torch.Generator().manual_seed(0)

    def drawn(like: torch.Tensor) -> torch.Tensor:
        shape = [min(size, _TRIED_SIZE) for size in like.shape]
        return torch.randn(shape, generator=generator).to(like.dtype)

    own = []
    for group in groups:
        some = group["params"][:_TRIED_PARAMETERS]
        own.append({**group, "params": [torch.nn.Parameter(drawn(p)) for p in some]})
    torch.manual_seed(0)
    optimizer = make(own)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(_TRIED_STEPS):
        for parameter in parameters:
            parameter.grad = drawn(parameter)
        if slices:
            step_parts(
                optimizer,
                [
                    Part(group, [p], slices if p.dim() and p.shape[0] >= slices and p.numel() > slices else 1)
                    for group in optimizer.param_groups
                    for p in group["params"]
                ],
            )
        else:
            optimizer.step()
    found: list[Any] = [p.detach() for p in parameters]
    for parameter in parameters:
        found += [value for _, value in sorted(optimizer.state[parameter].items(), key=lambda item: str(item[0]))]
    for group in optimizer.param_groups:
        found += [value for name, value in sorted(group.items()) if name != "params"]
    return found


def _same(one: Any, other: Any) -> bool:
    if not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)):
        return bool(one == other)
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    bits, others = (each.contiguous().flatten().view(torch.uint8) for each in (one, other))
    return bool(bits.equal(others))
