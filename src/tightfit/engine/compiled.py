"""A plan in compiled code: tags on ops, which the compiler's partitioner follows.

Idea: in code that `torch.compile` compiles there are no saved-tensor hooks and no dispatch modes. The partitioner
decides what is saved for backward, by a tag on each op. So a planned unit is handed to the compiler as a region of
selective checkpointing (`torch.utils.checkpoint`), with tags that say what the plan says. Ops that make dropped values
must run again. Matrix products and random ops whose values are kept must not. Everything cheap that the plan keeps is
left to the compiler, which makes it again inside a fused kernel where that is free.

The compiler sees other ops than those that the plan was made of: a dropout is one op, masks are made elsewhere, copies
come and go. So the two sequences of ops are aligned, and the alignment is checked. Every op that costs FLOPs or draws
random numbers must have a counterpart, whose inputs come from the counterparts of its inputs.

Invariant: tags decide what runs again, and the compiler takes care of random numbers (it keeps the generator's state,
or the seed, of each tagged op). So a wrong tag could cost bytes or FLOPs, but never a gradient.
Refused (`Unsupported`): ops that cannot be aligned, a graph break inside a unit, `activation_memory_budget` beside a
plan, and what tags cannot express: offload, nesting, tiles, the loss's gradient in place.

Source: torch/utils/checkpoint.py (policies) and torch/_functorch/partitioners.py (what they become).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tightfit.core import Choice, Kind, Plan, Program, TightfitError, Unsupported
from tightfit.levers import every
from tightfit.plan.program import Recipe, kept_values, recipe
from tightfit.step.ops import METADATA_ONLY, costs_flops, is_random, op_name
from tightfit.step.patches import compiled_entries
from tightfit.step.run import tensors_in

T = TypeVar("T")

__all__ = ["Decision", "Tagged", "doors", "require_expressible", "run_again"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tagged:
    """What the compiler was told about a unit when it compiled it."""

    recomputed: int  # ops that must run again
    saved: int  # ops that must not
    left: int  # ops that the plan keeps and the compiler may run again where that is free
    added: int  # ops that the compiler has and the planned step had not
    absent: int  # cheap ops of the planned step that the compiler has not


# --------------------------------------------------------------------------------------- what is expressible


def inexpressible(plan: Plan, whole: bool) -> str:
    """Why compiled code cannot carry out `plan`; empty where it can. `whole`: is the loss compiled too?"""
    # in order: each changes more of the step than the one before
    found = next((why for lever in reversed(every()) if (why := lever.not_compiled(plan, whole))), "")
    if not found:
        return ""
    return (
        f"the model is compiled, and its plan {found}, which tags for the compiler cannot say: make the plan with "
        f"levers={[each.lever.value for each in every() if each.is_compiled]}, or run the model without torch.compile"
    )


def require_expressible(plan: Plan, whole: bool) -> None:
    """Raise `Unsupported` for a plan that tags cannot carry out."""
    if reason := inexpressible(plan, whole):
        raise Unsupported(reason)


def _require_no_budget_of_its_own() -> None:
    import torch._functorch.config as functorch_config

    budget = float(functorch_config.activation_memory_budget)
    if budget != 1:
        raise Unsupported(
            f"torch._functorch.config.activation_memory_budget is {budget:g}: the compiler would decide what runs again"
            " beside the plan, and it gives dropout another mask when it does; set it to 1"
        )


# -------------------------------------------------------------------------------------------------- regions


class Decision:
    """What one kind of unit keeps. Equal units share one object, so that the compiler compiles them once."""

    def __init__(self, name: str, program: Program, kept: frozenset[int], refusal: str) -> None:
        self.name, self.program, self.kept, self.refusal = name, program, kept, refusal
        self.tagged: Tagged | None = None  # of the latest compilation
        # the compiler's guards compare functions by their code alone, and strings by what they say
        self.key = f"{name} {len(_decisions)}"
        _decisions[self.key] = self

    @staticmethod
    def of(module: nn.Module, plan: Plan, choice: Choice) -> Decision:
        program = plan.programs[choice.program]
        return _decision(type(module).__name__, program, kept_values(choice.actions), inexpressible(plan, whole=False))

    def region(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """`original` as the compiler is to take it. It is called only while the compiler traces."""
        key = self.key

        def forward(*args: Any, **kwargs: Any) -> Any:
            context = functools.partial(_contexts, key)
            return checkpoint(original, *args, use_reentrant=False, context_fn=context, **kwargs)

        return forward


_decisions: dict[str, Decision] = {}


@functools.cache
def _decision(name: str, program: Program, kept: frozenset[int], refusal: str) -> Decision:
    return Decision(name, program, kept, refusal)


def _contexts(key: str) -> tuple[Any, Any]:
    """The two contexts in which `torch.utils.checkpoint` runs a unit's forward while the compiler traces it: one for
    the forward, one for its second run."""
    decision = _decisions[key]
    if torch._guards.TracingContext.try_get() is None:
        raise Unsupported(
            f"the compiler broke off inside a unit ({decision.name}) and runs it in pieces, so a plan for the whole of "
            "it cannot be handed over; TORCH_LOGS=graph_breaks says where: mend that, or do not compile it"
        )
    if decision.refusal:
        raise Unsupported(decision.refusal)
    _require_no_budget_of_its_own()
    _make_room()
    region = _Region(decision)
    return region, region.replay


def run_again(function: Callable[..., T], args: Any, kwargs: Any, keep: Collection[str] | None = None) -> T:
    """`function` as a region that the compiler runs again in backward, except the ops that `keep` names."""
    if keep is None:
        out: T = checkpoint(function, *args, use_reentrant=False, **kwargs)
    else:
        context = functools.partial(_keeping, tuple(sorted(keep)))
        out = checkpoint(function, *args, use_reentrant=False, context_fn=context, **kwargs)
    return out


def _keeping(names: tuple[str, ...]) -> Any:
    _require_no_budget_of_its_own()

    def policy(_: Any, func: Any, *__: Any, **___: Any) -> CheckpointPolicy:
        full = op_name(func).rpartition(".")[0]
        kept = {op_name(func), full, full.rpartition(".")[2]}.intersection(names)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _make_room() -> None:
    """Raise the compiler's limit on compilations of one code object. Units that keep different values are compiled one
    by one under one code object. The limit is meant for code that the compiler cannot settle on; past it everything
    runs uncompiled."""
    import torch._dynamo.config as dynamo_config

    dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, 8 + len(_decisions))


@dataclass(slots=True)
class _Seen:
    """One op of a unit as the compiler traces it."""

    name: str
    nodes: list[Any]  # of the compiler's graph; none while it only infers shapes
    sources: frozenset[int]  # ops that made what it reads, looking through views
    view: bool
    weighs: bool


class _Region(TorchDispatchMode):
    """Watches the compiler trace a unit once. Afterwards it aligns the ops that it saw with the plan, and sets the
    tags.

    The tags are set afterwards because an op's counterpart is only known once the whole sequence is. They are put where
    torch's own selective checkpointing puts them (`node.meta["recompute"]`), which must have put its own there before.
    """

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """As torch's own mode for this, to which every op is passed on."""
        return True

    def __init__(self, decision: Decision) -> None:
        self.decision = decision
        self.seen: list[_Seen] = []
        self.makers: dict[int, tuple[Any, frozenset[int]]] = {}  # by tensor: itself, and the ops that made it
        self.length = 0
        self.mode, self.replay = create_selective_checkpoint_contexts(self._policy)
        self.asked = False
        super().__init__()

    @property
    def ac_graph_id(self) -> Any:
        """Set by torch, which numbers the regions of a graph."""
        return self.mode.ac_graph_id

    @ac_graph_id.setter
    def ac_graph_id(self, value: Any) -> None:
        self.mode.ac_graph_id = value

    def __enter__(self) -> Any:
        graph = _graph()
        self.length = 0 if graph is None else len(graph.nodes)
        return super().__enter__()

    def __exit__(self, kind: Any, error: Any, where: Any) -> None:
        super().__exit__(kind, error, where)
        if kind is None:
            self._settle()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.asked = False
        out = self.mode.__torch_dispatch__(func, types, args, kwargs)
        if self.asked:
            self._note(func, args, kwargs or {}, out)
        return out

    def _policy(self, context: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        """Torch asks before the op has run (2.11) or after it (2.13), and not for every op."""
        self.asked = True
        return CheckpointPolicy.PREFER_SAVE

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        graph = _graph()
        nodes: list[Any] = []
        if graph is not None:
            nodes = [n for n in itertools.islice(reversed(graph.nodes), len(graph.nodes) - self.length) if _counts(n)]
            self.length = len(graph.nodes)
        sources = frozenset().union(
            *(self.makers[id(t)][1] for t in tensors_in((args, kwargs)) if id(t) in self.makers), ()
        )
        made = sources if func.is_view else frozenset({len(self.seen)})
        for tensor in tensors_in(out):
            self.makers[id(tensor)] = tensor, made
        weighs = costs_flops(op_name(func)) or is_random(func, args, kwargs)
        self.seen.append(_Seen(op_name(func), nodes, sources, func.is_view, weighs))

    def _settle(self) -> None:
        self.makers.clear()
        decision = self.decision
        twins = _twins(decision.name, decision.program, self.seen)
        chosen = recipe(decision.program, decision.kept)
        tags, decision.tagged = _tags(decision.program, chosen, self.seen, twins)
        # computed sizes are nodes of the graph too, and torch does not tag them
        nodes = [(node, tag) for each, tag in zip(self.seen, tags, strict=True) for node in each.nodes]
        tagged = [(node, tag) for node, tag in nodes if "recompute" in node.meta]
        if nodes and not tagged:
            raise Unsupported(
                f"torch {torch.__version__} does not tag the ops of a checkpointed region, so a plan cannot be handed "
                "to its compiler"
            )
        for node, tag in tagged:
            node.meta["recompute"] = tag


def _graph() -> Any:
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    mode = get_proxy_mode()
    return None if mode is None else mode.tracer.graph


def _counts(node: Any) -> bool:
    return node.op == "call_function" and node.target is not torch.ops.aten.detach.default


# ------------------------------------------------------------------------------------------------ alignment

#: What torch calls dropout on the CPU below autograd; the compiler sees it as one op.
_DROPOUT = ("aten.empty_like.default", "aten.bernoulli_.float", "aten.div_.Scalar")
_DROPOUT_ENDS = ("aten.mul.Tensor", "aten.mul_.Tensor")
_FUSED_DROPOUT = "aten.native_dropout.default"


def _tokens(program: Program) -> list[tuple[str, tuple[int, ...]]]:
    """The planned ops under the names that the compiler has for them, with their ordinals."""
    names = [step.name for step in program.steps]
    found: list[tuple[str, tuple[int, ...]]] = []
    at = 0
    while at < len(names):
        if tuple(names[at : at + 3]) == _DROPOUT and names[at + 3 : at + 4] and names[at + 3] in _DROPOUT_ENDS:
            found.append((_FUSED_DROPOUT, tuple(range(at, at + 4))))
            at += 4
        else:
            found.append((names[at], (at,)))
            at += 1
    return found


def _twins(name: str, program: Program, seen: Sequence[_Seen]) -> dict[int, tuple[int, ...]]:
    """For each op of `seen` that has counterparts in the plan, the ordinals of these. Raises `Unsupported` where an op
    has none but needs one."""
    tokens = _tokens(program)
    candidates = [i for i, each in enumerate(seen) if not each.view]
    planned = tuple(token for token, _ in tokens)
    pairs = _aligned(planned, tuple(seen[i].name for i in candidates))
    twins = {candidates[b]: tokens[a][1] for a, b in pairs}
    drawing = {i for i, step in enumerate(program.steps) if step.kind is Kind.RANDOM}
    paired = {op for ops in twins.values() for op in ops}
    for token, ops in tokens:
        if (costs_flops(token) or drawing.intersection(ops)) and not paired.issuperset(ops):
            raise _differs(name, f"the plan has {token} (op {ops[0]}), of which the compiler has no counterpart")
    for i in candidates:
        if seen[i].weighs and i not in twins:
            raise _differs(name, f"the compiler has {seen[i].name}, of which the plan has no counterpart")
    _check_wiring(name, program, seen, twins)
    return twins


def _differs(name: str, how: str) -> Unsupported:
    return Unsupported(
        f"a unit ({name}) is compiled to other ops than its plan was made of: {how}; make the plan anew from this "
        "model, or leave this unit out of the units"
    )


#: Ops that read only the shape of their input. A plan's steps do not count the input as read.
_SHAPE_ONLY = frozenset(map(op_name, METADATA_ONLY))


def _check_wiring(name: str, program: Program, seen: Sequence[_Seen], twins: dict[int, tuple[int, ...]]) -> None:
    """Check that the inputs of each op that weighs (it costs FLOPs or draws random numbers) come from the counterparts
    of its inputs in the plan."""
    feeds: list[frozenset[int]] = []  # per planned op: the ops that weigh behind what it reads
    drawing = {i for i, step in enumerate(program.steps) if step.kind is Kind.RANDOM}
    behind: dict[int, frozenset[int]] = {}  # value -> ops that weigh behind it
    first_of = {op: ops[0] for ops in twins.values() for op in ops}
    weighs = {first_of.get(i, i) for i, step in enumerate(program.steps) if costs_flops(step.name) or i in drawing}
    for i, step in enumerate(program.steps):
        reads = frozenset().union(*(behind.get(v, frozenset()) for v in (*step.reads, *step.reads_early)), ())
        feeds.append(reads)
        group = first_of.get(i, i)
        for value in step.writes:
            behind[value] = frozenset({group}) if group in weighs else behind.get(value, frozenset()) | reads
    found: list[frozenset[int]] = []
    for i, each in enumerate(seen):
        read = () if each.name in _SHAPE_ONLY else each.sources
        sources = frozenset().union(*(frozenset({s}) if seen[s].weighs else found[s] for s in read), ())
        found.append(sources)
        if each.weighs and i in twins:
            allowed = frozenset().union(*(feeds[op] for op in twins[i]), ())
            actual = {twins[s][0] for s in sources}
            if not actual <= allowed:
                raise _differs(name, f"{each.name} reads what comes from another op than in the plan")


@functools.lru_cache(maxsize=256)
def _aligned(planned: tuple[str, ...], compiled: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """Pairs of equal names, in order. The alignment pairs as many ops that cost FLOPs as it can, and then as many other
    ops as it can."""
    weight = {name: 1000 if costs_flops(name) or name == _FUSED_DROPOUT else 1 for name in {*planned, *compiled}}
    rows, columns = len(planned), len(compiled)
    best = [[0] * (columns + 1) for _ in range(rows + 1)]
    for a in range(rows - 1, -1, -1):
        here, below, name = best[a], best[a + 1], planned[a]
        for b in range(columns - 1, -1, -1):
            score = max(below[b], here[b + 1])
            if name == compiled[b]:
                score = max(score, below[b + 1] + weight[name])
            here[b] = score
    pairs = []
    a = b = 0
    while a < rows and b < columns:
        if planned[a] == compiled[b] and best[a][b] == best[a + 1][b + 1] + weight[planned[a]]:
            pairs.append((a, b))
            a, b = a + 1, b + 1
        elif best[a][b] == best[a + 1][b]:
            a += 1
        else:
            b += 1
    return tuple(pairs)


def _tags(
    program: Program, chosen: Recipe, seen: Sequence[_Seen], twins: dict[int, tuple[int, ...]]
) -> tuple[list[CheckpointPolicy], Tagged]:
    tags = []
    counts = dict.fromkeys(("recomputed", "saved", "left", "added"), 0)
    for i, each in enumerate(seen):
        ops = twins.get(i)
        if each.view:  # no bytes of its own: wherever its base is
            tags.append(CheckpointPolicy.PREFER_SAVE)
            continue
        if ops is None:  # cheap, by the check above
            counts["added"] += 1
            tags.append(CheckpointPolicy.PREFER_RECOMPUTE)
        elif chosen.runs.intersection(ops):
            counts["recomputed"] += 1
            tags.append(CheckpointPolicy.MUST_RECOMPUTE)
        elif each.weighs:
            counts["saved"] += 1
            tags.append(CheckpointPolicy.MUST_SAVE)
        else:
            counts["left"] += 1
            tags.append(CheckpointPolicy.PREFER_SAVE)
    paired = {op for ops in twins.values() for op in ops}
    return tags, Tagged(**counts, absent=len(program.steps) - len(paired))


# -------------------------------------------------------------------------------------------------- entries


class _Door:
    """An entry into compiled code from outside. `before` runs first, and tightfit's own errors leave it as they are,
    not wrapped by the compiler."""

    def __init__(self, module: nn.Module, call: Callable[..., Any], before: Callable[..., Any] | None) -> None:
        self.module, self.call, self.before = module, call, before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.before is not None:
            self.before(self.module, args, kwargs)
        try:
            return self.call(*args, **kwargs)
        except Exception as error:
            ours = _ours(error)
            if ours is None:
                raise
            ours.args = (str(ours).partition("\n")[0],)  # the compiler adds where it was
            raise ours from None


def _ours(error: BaseException | None) -> TightfitError | None:
    """The error of tightfit that the compiler has wrapped in `error`."""
    known: set[int] = set()
    while error is not None and id(error) not in known:
        known.add(id(error))
        if isinstance(error, TightfitError):
            return error
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def doors(model: nn.Module, before: Callable[..., Any] | None = None) -> Iterator[None]:
    """While open, every entry into compiled code of `model` is a `_Door`. `before` runs at the entry of the model
    itself."""
    undo: list[Callable[[], None]] = []
    for path, module in compiled_entries(model).items():
        attribute = "_compiled_call_impl" if "_compiled_call_impl" in vars(module) else "forward"
        call = getattr(module, attribute)
        door = _Door(module, call, before if path == "" and attribute != "forward" else None)
        setattr(module, attribute, door)
        undo.append(functools.partial(setattr, module, attribute, call))
    try:
        yield
    finally:
        for put_back in reversed(undo):
            put_back()
