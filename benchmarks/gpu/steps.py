"""What the kit does on a card, the most important first. `STEPS` is the list that `run.py` works through.

Each step is a function that yields its results one by one, so that a step which is cut off keeps those that it has. It
runs in a process of its own and on whatever `Card` it is given: in a dry run the CPU, with tiny shapes, by the same
code. What only a card has (reserved bytes, streams, a backward thread of its own) is None or left out there.

Invariant: no step changes a registered forecast. A case that fails is a row that says why, and the next one runs.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from card import Card
from cases import EVERY_BLOCK, LEAST, LEAST_TILED, MIDDLE, MODEL_OF_TIME, NONE, Case, plan_of, step_of
from memory import failed, memory_a, memory_b, memory_c, memory_d, memory_s, what_is_registered
from run import LIMITS, device_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tightfit
from tightfit.core import BudgetInfeasible, Category, Plan, dumps
from tightfit.device.allocator import CachingAllocator
from tightfit.forecast import Setup, calibrate
from tightfit.forecast.calibrating import Effort
from tightfit.plan.account import host_bytes
from tightfit.step.checksum import checksum
from tightfit.step.ops import UNWRITTEN, op_name
from tightfit.step.patches import no_key_value_cache
from tightfit.step.run import compute_loss, tensors_in
from tightfit.step.snapshot import undisturbed
from tightfit.step.weights import frozen_modules
from tightfit.verify.gradients import Outcome, differences
from tightfit.verify.measure import every_block_checkpointed
from tightfit.verify.peak import static_bytes

Rows = Iterator[dict[str, Any]]


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """torch's deterministic kernels, where there are some; what has none says so in the log."""
    if wanted:
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _repeatable_products() -> None:
    """cuBLAS reads this once, before its first product."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"


# ------------------------------------------------------------------------------------------------ environment


def environment_step(card: Card) -> Rows:
    """Versions, card and the allocator's settings; which forecasts are registered; the caching allocator against
    `tightfit.device.allocator`; cuBLAS's workspaces in the calling thread and in backward's; what pinned requests take.
    """
    yield {"facts": card.facts()}
    yield {"registered": what_is_registered()}
    yield {"allocator": _allocator(card)}  # first, while nothing else has left segments behind
    yield {"workspaces": _workspaces(card)}
    if card.is_cuda:
        yield {"pinned": _pinned()}
    if card.is_cuda:
        yield {"facts_after": card.facts()}


def _workspaces(card: Card) -> dict[str, Any]:
    """Bytes that stay after the first matrix product of the calling thread, and of backward's."""
    if not card.is_cuda:
        return {"first_product_bytes": None, "first_backward_bytes": None}
    size = 256
    a = torch.randn(size, size, device=card.device, dtype=torch.bfloat16, requires_grad=True)
    before = torch.cuda.memory_allocated()
    out = torch.mm(a, a)
    product = torch.cuda.memory_allocated() - before - 2 * size * size
    out.sum().backward()
    torch.cuda.synchronize()
    del out
    a.grad = None
    return {
        "first_product_bytes": product,
        "first_backward_bytes": torch.cuda.memory_allocated() - before - product,
    }


def _allocator(card: Card) -> dict[str, Any]:
    """Random blocks, taken and given back, by the card's allocator and by `tightfit.device.allocator`."""
    draw = random.Random(0)
    model, live, real = CachingAllocator(), [], {}
    worst_allocated = worst_reserved = 0
    count, most = (60, 1 << 16) if card.is_dry else (400, 1 << 28)
    card.empty()
    base_allocated = torch.cuda.memory_allocated() if card.is_cuda else 0
    base_reserved = torch.cuda.memory_reserved() if card.is_cuda else 0
    for key in range(count):
        if live and draw.random() < 0.45:
            gone = live.pop(draw.randrange(len(live)))
            model.free(gone)
            real.pop(gone)
        else:
            size = int(2 ** draw.uniform(4, most.bit_length() - 1))
            model.allocate(key, size)
            real[key] = torch.empty(size, dtype=torch.uint8, device=card.device)
            live.append(key)
        if card.is_cuda:
            off = torch.cuda.memory_allocated() - base_allocated - model.allocated_bytes
            worst_allocated = max(worst_allocated, off, key=abs)
            off = torch.cuda.memory_reserved() - base_reserved - model.reserved_bytes
            worst_reserved = max(worst_reserved, off, key=abs)
    return {
        "blocks": count, "most_allocated_bytes": model.allocated_peak_bytes,
        "most_reserved_bytes": model.reserved_peak_bytes,
        "allocated_off_bytes": worst_allocated if card.is_cuda else None,
        "reserved_off_bytes": worst_reserved if card.is_cuda else None,
    }  # fmt: skip


def _pinned() -> dict[str, Any]:
    """What a pinned request really takes; torch rounds it up."""
    asked = [3 << 20, 5 << 20, 33 << 20]
    held = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in asked]
    stats = torch.cuda.host_memory_stats() if hasattr(torch.cuda, "host_memory_stats") else {}
    del held
    return {"asked_bytes": asked, "stats": {k: v for k, v in stats.items() if k.endswith((".current", ".peak"))}}


# ---------------------------------------------------------------------------------------------- repeatability


class Fingerprints(TorchDispatchMode):
    """A mark of every tensor that each op reads and writes. The marks stay on the device until they are read."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self._marks: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = self._of((args, kwargs))
        out = func(*args, **(kwargs or {}))
        self.names.append(op_name(func))
        self._marks.append((read, [] if func in UNWRITTEN else self._of(out)))
        return out

    @staticmethod
    def _of(tree: Any) -> list[torch.Tensor]:
        return [mark for t in tensors_in(tree) if t.numel() and (mark := checksum(t)) is not None]

    def ops(self) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
        return [
            (name, tuple(int(m) for m in read), tuple(int(m) for m in written))
            for name, (read, written) in zip(self.names, self._marks, strict=True)
        ]


def _two_runs(model: nn.Module, batch: Any) -> dict[str, Any]:
    """Which ops give another result from the same arguments, and how many gradients differ."""
    outcomes, runs, forward_ops = [], [], 0
    with undisturbed(model, batch) as restart, no_key_value_cache(model):
        for _ in range(2):
            restart()
            with Fingerprints() as prints:
                loss = compute_loss(model, batch)
                forward_ops = len(prints.names)
                loss.backward()
            runs.append(prints.ops())
            outcomes.append(Outcome(model))
    sources: Counter[str] = Counter()
    for one, other in zip(*runs):
        if one[:2] == other[:2] and one[2] != other[2]:
            sources[one[0]] += 1
    return {
        "ops": len(runs[0]), "same_ops": [o[0] for o in runs[0]] == [o[0] for o in runs[1]],
        "backward_ops_seen": len(runs[0]) - forward_ops, "not_the_same_twice": dict(sources),
        "gradients_differ": len(differences(*outcomes)),
    }  # fmt: skip


def _small(card: Card, kind: str, dtype: str = "bf16", method: str = "full", seq: int = 512) -> Case:
    """A small step: `kind` is gpt2, with dropout, or llama."""
    name = {"gpt2": "tiny-gpt2", "llama": "tiny-llama"}[kind] if card.is_dry else {
        "gpt2": "gpt2", "llama": MODEL_OF_TIME,
    }[kind]  # fmt: skip
    seq = 64 if card.is_dry else seq
    setup = Setup(model=name, method=method, batch=2, seq=seq, dtype=dtype, rank=4 if card.is_dry else 16)
    return Case(name=f"{kind}, {method}, {dtype}", setup=setup, modes=())


def repeatability(card: Card) -> Rows:
    """The plain step twice, op by op, with the default kernels and the deterministic ones: which ops give other bits
    from the same arguments. Where bits differ without any plan, no plan can be held to them."""
    _repeatable_products()
    for kind, method in (("gpt2", "full"), ("llama", "lora")):
        model, batch, _ = step_of(_small(card, kind, method=method), card.device)
        for kernels in ("default", "deterministic"):
            with deterministic(kernels == "deterministic"):
                yield {"case": f"{kind}, {method}", "kernels": kernels, **_two_runs(model, batch)}
        del model, batch
        card.empty()


# ------------------------------------------------------------------------------------------------- gradients


def _loss_of(case: Case, card: Card) -> Any:
    """The model's own loss, under autocast where the case's dtype is mixed."""
    if not case.setup.dtype.endswith("-mixed"):
        return None

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        with torch.autocast(card.device.type, dtype=torch.bfloat16):
            found: torch.Tensor = model(**batch).loss
            return found

    return loss


def _proofs(card: Card, case: Case, modes: tuple[str, ...], kernels: tuple[str, ...], *, tiles: bool = False) -> Rows:
    model, batch, optimizer = step_of(case, card.device)
    loss = _loss_of(case, card)
    for kernel in kernels:
        with deterministic(kernel == "deterministic"):
            row: dict[str, Any] = {"case": case.name, "kernels": kernel}
            try:
                trace = tightfit.trace(model, batch, loss=loss, optimizer=optimizer, tiles=tiles)
            except Exception as error:
                yield row | failed(error)
                continue
            for mode in modes:
                yield row | {"mode": mode} | _proof(model, batch, plan_of(trace, mode), loss, optimizer)
    del model, batch, optimizer
    card.empty()


def _proof(model: Any, batch: Any, plan: Plan | None, loss: Any, optimizer: Any) -> dict[str, Any]:
    assert plan is not None
    try:
        proof = tightfit.verify(model, batch, plan, loss=loss, optimizer=optimizer)
    except Exception as error:
        return failed(error)
    return {
        "passed": proof.passed, "replays": plan.replays, "exact": plan.exact,
        "checks": {
            c.name: {"passed": c.passed, "expected": c.expected, "measured": c.measured, "tolerance": c.tolerance}
            for c in proof.checks
        },
    }  # fmt: skip


def gradients(card: Card) -> Rows:
    """Every gradient bit by bit under plans: GPT-2 with dropout, Llama with LoRA; fp32, bf16, autocast. With
    deterministic kernels nothing is excused. Then a plan with tiles, piece by piece against float64."""
    _repeatable_products()
    modes, kernels = (EVERY_BLOCK, MIDDLE, LEAST), ("deterministic", "default")
    cases = (
        ("gpt2", "fp32", "full"), ("llama", "bf16", "lora"), ("gpt2", "bf16-mixed", "full"), ("gpt2", "bf16", "full"),
        ("llama", "bf16-mixed", "lora"), ("llama", "bf16", "full"),
    )  # fmt: skip
    if card.is_dry:
        modes, kernels, cases = modes[:2], kernels[:1], cases[:3]
    for kind, dtype, method in cases:
        yield from _proofs(card, _small(card, kind, dtype, method), modes, kernels)
    yield from _proofs(card, _small(card, "llama", method="lora"), (LEAST_TILED,), kernels[:1], tiles=True)


# ------------------------------------------------------------------------------------------------------- time


def _selective(model: Any) -> Any:
    """torch's selective checkpointing of every block: matrix products and attention are kept."""
    import peers

    aten = torch.ops.aten
    attention = [
        aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default, *peers.ATTENTION,
    ]  # fmt: skip
    return peers.checkpointed(model, save=[*peers.PRODUCTS, *attention])


Way = tuple[Callable[[], Any], Callable[[], None]]


def _peak_and_way(card: Card, model: Any, batch: Any, context: Callable[[], Any]) -> tuple[int, Way]:
    """The peak of forward and backward within `context`, and the two as a way to be timed."""

    def run() -> None:
        compute_loss(model, batch).backward()
        model.zero_grad(set_to_none=True)

    with context():
        run()
        with card.peak(static_bytes(model, None, batch)) as peak:
            run()
    return peak.allocated_bytes, (context, run)


def time_step(card: Card) -> Rows:
    """Seconds of a step without checkpointing, with every block, with torch's selective checkpointing, and by tightfit
    at the peak that each of these was measured at."""
    repeats = 2 if card.is_dry else 10
    for kind, method in (("llama", "lora"), ("gpt2", "full"))[: 1 if card.is_dry else 2]:
        case = _small(card, kind, method=method, seq=1024 if kind == "gpt2" else 2048)
        model, batch, _ = step_of(case, card.device)
        with no_key_value_cache(model):
            trace = tightfit.trace(model, batch, tiles=False)
            peers: dict[str, Callable[[], Any]] = {
                NONE: contextlib.nullcontext,
                EVERY_BLOCK: functools.partial(every_block_checkpointed, model),
                "selective": functools.partial(_selective, model),
            }
            peaks: dict[str, int] = {}
            ways: dict[str, Way] = {}
            for name, context in peers.items():
                peaks[name], ways[name] = _peak_and_way(card, model, batch, context)
            # what the trace does not hold, such as the libraries' workspaces, is the peer's too
            beside = peaks[NONE] - tightfit.simulate(trace).peak_bytes
            budgets = {name: peaks[name] - beside for name in (EVERY_BLOCK, "selective")}
            replays: dict[str, int] = {}
            for name, budget in budgets.items():
                mine = f"tightfit at {name}'s peak"
                try:
                    plan = tightfit.plan(trace, budget, exact=True)
                except BudgetInfeasible as error:
                    yield {"case": case.name, "way": mine, **failed(error)}
                    continue
                applied = tightfit.apply(model, plan)
                applied.suspend()
                resumed = functools.partial(_resumed, applied, plan)
                peaks[mine], ways[mine] = _peak_and_way(card, model, batch, resumed)
                replays[mine] = plan.replays
            seconds = card.in_turn(ways, repeats)
        for name, found in seconds.items():
            yield {
                "case": case.name, "way": name, "allocated_bytes": peaks[name], "seconds": found,
                "ratio": found["median"] / seconds[NONE]["median"], "beside_bytes": beside,
                **({"replays": replays[name]} if name in replays else {}),
            }  # fmt: skip
        del model, batch, trace, ways
        card.empty()


@contextlib.contextmanager
def _resumed(applied: Any, plan: Plan) -> Iterator[None]:
    applied.resume(plan)
    try:
        yield
    finally:
        applied.suspend()


def overhead_step(card: Card) -> Rows:
    """Microseconds of the host per op, on tensors so small that the device has nothing to do."""
    import overhead

    yield overhead.measured(card.device, 3 if card.is_dry else 25)


def calibration(card: Card) -> Rows:
    """What `tightfit calibrate` measures of the device, in a process that has not used it yet. The plans that later
    steps make reckon with it; registered forecasts and plans stay what they are."""
    made = calibrate(card.device, effort=Effort(whole_seconds=12))
    yield {"calibration": json.loads(dumps(made))}
    made.save(device_file(card.folder, is_dry=card.is_dry))


# ---------------------------------------------------------------------------------------------------- offload


def offload(card: Card) -> Rows:
    """How much of the copies is hidden behind the compute; then 200 steps whose gradients must all have the same
    checksum, while other blocks are written and freed between them."""
    _repeatable_products()
    case = _small(card, "llama", method="lora", seq=2048)
    model, batch, _ = step_of(case, card.device)
    with no_key_value_cache(model), deterministic(True), undisturbed(model, batch) as restart:
        trace = tightfit.trace(model, batch, tiles=False)
        fixed, top = sum(trace.static_bytes.values()), tightfit.simulate(trace).peak_bytes
        plan = None
        for part in (4, 6, 8):
            with contextlib.suppress(BudgetInfeasible):
                plan = tightfit.plan(trace, fixed + (top - fixed) * part // 10, levers={"recompute", "offload"})
                if plan.offloaded_bytes:
                    break
        if plan is None or not plan.offloaded_bytes:
            plan = _everything_away(trace)
        applied = tightfit.apply(model, plan)
        applied.suspend()

        def plain() -> None:
            restart()
            compute_loss(model, batch).backward()

        resumed = functools.partial(_resumed, applied, plan)
        with resumed():
            plain()
        seconds = card.in_turn(
            {"plain": (contextlib.nullcontext, plain), "offload": (resumed, plain)}, 2 if card.is_dry else 8
        )
        copies = _copy_seconds(card, plan.offloaded_bytes)
        added = seconds["offload"]["median"] - seconds["plain"]["median"] - plan.recompute_seconds
        yield {
            "case": case.name, "offloaded_bytes": plan.offloaded_bytes, "seconds": seconds, "copy_seconds": copies,
            "recompute_seconds": plan.recompute_seconds, "replays": plan.replays,
            "hidden": 1 - added / sum(copies.values()) if card.is_cuda else None,
        }  # fmt: skip
        yield {"case": case.name, **_race(card, model, plain, resumed, steps=10 if card.is_dry else 200)}
        applied.remove()


def _everything_away(trace: Any) -> Plan:
    """The plan of every block whose inputs wait off the device, where the planner would rather recompute."""
    from tightfit.core import Action
    from tightfit.plan import every_block

    made = every_block(trace)
    choices = []
    for choice in made.choices:
        frame = next(f for f in trace.frames if f.unit == choice.unit)
        widest = max(trace.values[v].size_bytes for v in frame.inputs)
        inputs = tuple(Action.OFFLOAD if trace.values[v].size_bytes == widest else Action.KEEP for v in frame.inputs)
        choices.append(dataclasses.replace(choice, inputs=inputs))
    line = tightfit.simulate(trace, dataclasses.replace(made, choices=tuple(choices)))
    return dataclasses.replace(
        made, choices=tuple(choices), peak_bytes=line.peak_bytes, budget_bytes=line.peak_bytes,
        offloaded_bytes=line.offloaded_bytes,
    )  # fmt: skip


def _copy_seconds(card: Card, size_bytes: int) -> dict[str, float]:
    """Seconds of the same bytes with nothing beside them."""
    size_bytes = max(1, size_bytes)
    here = torch.empty(size_bytes, dtype=torch.uint8, device=card.device)
    there = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=card.is_cuda)
    there.copy_(here)
    return {
        "out": card.seconds(lambda: there.copy_(here, non_blocking=True)),
        "back": card.seconds(lambda: here.copy_(there, non_blocking=True)),
    }


def _race(card: Card, model: Any, run: Callable[[], None], resumed: Callable[[], Any], steps: int) -> dict[str, Any]:
    """`steps` planned steps whose gradients must all have the checksum of the plain one's. Between them blocks of
    random sizes are written and given back, so that memory which is freed too early is used by somebody else."""

    def marks() -> list[int]:
        return [int(mark) for p in model.parameters() if p.grad is not None and (mark := checksum(p.grad)) is not None]

    run()
    expected, draw, wrong = marks(), random.Random(0), []
    for step in range(steps):
        with resumed():
            run()
        noise = [
            torch.full((draw.randrange(1, 1 << (12 if card.is_dry else 26)),), float("nan"), device=card.device)
            for _ in range(4)
        ]
        if draw.random() < 0.5:
            del noise
        if marks() != expected:
            wrong.append(step)
        if card.is_cuda and draw.random() < 0.05:
            gc.collect()
            torch.cuda.empty_cache()
    return {"steps": steps, "gradients": len(expected), "wrong_steps": wrong}


# ------------------------------------------------------------------------------------- compiled steps and 4 bits


def compiled(card: Card) -> Rows:
    """A compiled step by torch's `activation_memory_budget`, and by tightfit at its peak; the proof of the plan."""
    import torch._functorch.config as functorch_config

    backend = "aot_eager_decomp_partition" if card.is_dry else "inductor"
    case = _small(card, "llama", method="lora", seq=2048)
    repeats = 1 if card.is_dry else 8

    def fresh() -> tuple[Any, Any]:
        torch.compiler.reset()
        model, batch, _ = step_of(case, card.device)
        model.config.use_cache = False
        model.compile(backend=backend)
        return model, batch

    for budget in (0.5,):  # another costs a minute of compiling
        row: dict[str, Any] = {"case": case.name, "activation_memory_budget": budget}
        try:
            with functorch_config.patch(activation_memory_budget=budget):
                model, batch = fresh()
                peak, way = _peak_and_way(card, model, batch, contextlib.nullcontext)
                found = card.in_turn({"torch": way}, repeats)["torch"]
            yield row | {"way": "torch's budget", "allocated_bytes": peak, "seconds": found}
            del model, batch, way
            card.empty()
            model, batch = fresh()
            applied = tightfit.fit(model, batch, peak, exact=True)
            mine, way = _peak_and_way(card, model, batch, contextlib.nullcontext)
            found = card.in_turn({"tightfit": way}, repeats)["tightfit"]
            yield row | {
                "way": "tightfit, compiled", "allocated_bytes": mine, "seconds": found, "budget_bytes": peak,
                "replays": applied.plan.replays,
            }  # fmt: skip
            plan = applied.plan
            applied.remove()
            yield row | {"way": "proof"} | _proof(model, batch, plan, None, None)
        except Exception as error:
            yield row | failed(error)


def nf4(card: Card) -> Rows:
    """4-bit weights with LoRA under plans, by bitsandbytes' own kernels, if it travelled."""
    try:
        import bitsandbytes
    except ImportError as error:
        yield {"skipped": f"bitsandbytes is not here ({error})"}
        return
    yield {"bitsandbytes": bitsandbytes.__version__}
    _repeatable_products()
    modes, kernels = (EVERY_BLOCK, MIDDLE, LEAST), ("deterministic", "default")
    if card.is_dry:
        modes, kernels = modes[1:2], kernels[:1]
    yield from _proofs(card, _small(card, "llama", method="qlora"), modes, kernels)


def streamed(card: Card) -> Rows:
    """A model in host memory, put on the card but for the frozen weights that its plan streams: gradients against those
    of the same model on the card, the peak against the prediction, and how much of the copies is hidden."""
    _repeatable_products()
    case = _small(card, "llama", method="lora")
    model, batch, _ = step_of(case, torch.device("cpu"))
    batch = {name: tensor.to(card.device) for name, tensor in batch.items()}

    def step(subject: Any) -> None:
        subject.zero_grad(set_to_none=True)
        compute_loss(subject, batch).backward()

    expected, seconds = _plain_there(card, copy.deepcopy(model).to(card.device), step)
    card.empty()
    trace = tightfit.trace(model, batch, fake=True, device=card.device, tiles=False)
    most_bytes, frozen_bytes = tightfit.simulate(trace).peak_bytes, sum(m.size_bytes for m in frozen_modules(model))
    for share in (0.3, 0.6):  # of the frozen weights, to be found elsewhere
        budget_bytes = most_bytes - int(share * frozen_bytes)
        row = {"case": case.name, "share": share, "budget_bytes": budget_bytes}
        try:
            with (
                deterministic(True),
                tightfit.fit(
                    model, batch, budget_bytes, levers="stream_weights", device=card.device, longer="allow"
                ) as applied,
            ):
                before_bytes = torch.cuda.memory_allocated() if card.is_cuda else 0
                card.empty()
                peaks = []
                for _ in range(6):  # copies are compared by checksum in the first few
                    if card.is_cuda:
                        torch.cuda.reset_peak_memory_stats()
                    step(model)
                    peaks.append(torch.cuda.max_memory_allocated() if card.is_cuda else None)
                found, before = differences(expected, Outcome(model)), applied.stats().levers["stream_weights"]
                step(model)
                copied = applied.stats().levers["stream_weights"] - before
                took = card.in_turn({"streamed": (contextlib.nullcontext, functools.partial(step, model))}, 2)
                added = took["streamed"]["median"] - seconds["plain"]["median"]
                alone = _copy_seconds(card, copied.copied_bytes)["back"]  # with nothing beside them
                yield row | {
                    "identical": not found, "predicted_peak_bytes": applied.plan.peak_bytes, "peak_bytes": peaks,
                    "there_bytes": before_bytes, "settings": dict(applied.plan.settings),
                    "seconds": {**seconds, **took}, "predicted_slowdown": applied.plan.slowdown,
                    "copied": dataclasses.asdict(copied), "ahead": applied.plan.ahead, "copy_seconds": alone,
                    "hidden": 1 - added / alone if card.is_cuda else None,
                }  # fmt: skip
        except Exception as error:
            yield row | failed(error)


def state(card: Card) -> Rows:
    """Optimizer state that waits in host memory: weights after three steps against those of the plain run, the peak
    against the prediction, and seconds with copies ahead and without."""
    _repeatable_products()
    case = _small(card, "llama")
    model, batch, optimizer = step_of(case, card.device)

    def steps(times: int = 1) -> None:
        for _ in range(times):
            optimizer.zero_grad(set_to_none=True)
            compute_loss(model, batch).backward()
            optimizer.step()

    with no_key_value_cache(model), deterministic(True):
        steps()  # makes the state
        weights = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters()}
        moments = copy.deepcopy(optimizer.state_dict())

        def again() -> None:
            for name, parameter in model.named_parameters():
                parameter.data.copy_(weights[name])
            optimizer.load_state_dict(copy.deepcopy(moments))

        steps(3)
        expected = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters()}
        plain = card.in_turn({"plain": (contextlib.nullcontext, steps)}, 2)
        again()
        card.empty()
        trace = tightfit.trace(model, batch, optimizer=optimizer, tiles=False)
        before_bytes = tightfit.simulate(trace).peak_bytes
        state_bytes = trace.static_bytes[Category.OPTIMIZER_STATE.value]
        made = tightfit.plan(trace, before_bytes - int(0.5 * state_bytes), levers="state_in_host")
        ways = {"in turn": dataclasses.replace(made, ahead=()), "as planned": made}
        for name, plan in ways.items():
            row = {"case": case.name, "way": name, "ahead": plan.ahead, "settings": dict(plan.settings)}
            try:
                again()
                with tightfit.apply(model, plan, optimizer=optimizer):
                    steps(2)
                    card.empty()
                    if card.is_cuda:
                        torch.cuda.reset_peak_memory_stats()
                    steps()
                    peak_bytes = torch.cuda.max_memory_allocated() if card.is_cuda else None
                    off = [n for n, p in model.named_parameters() if not torch.equal(p.detach().cpu(), expected[n])]
                    took = card.in_turn({name: (contextlib.nullcontext, steps)}, 2)
                yield row | {
                    "identical": not off, "predicted_peak_bytes": tightfit.simulate(trace, plan).peak_bytes,
                    "peak_bytes": peak_bytes, "seconds": {**plain, **took}, "predicted_slowdown": made.slowdown,
                    "copy_seconds": _copy_seconds(card, sum(host_bytes(trace, plan).values())),
                }  # fmt: skip
            except Exception as error:
                yield row | failed(error)


def _plain_there(card: Card, model: Any, step: Callable[[Any], None]) -> tuple[Outcome, dict[str, Any]]:
    """Gradients and seconds of the step of a model that is on the card whole."""
    with no_key_value_cache(model), deterministic(True):
        step(model)
        found = Outcome(model)
        model.zero_grad(set_to_none=True)
        return found, card.in_turn({"plain": (contextlib.nullcontext, functools.partial(step, model))}, 2)


STEPS: dict[str, Callable[[Card], Rows]] = {
    "environment": environment_step,
    "repeatability": repeatability,
    "gradients": gradients,
    "calibration": calibration,
    "memory-B": memory_b,
    "memory-C": memory_c,
    "memory-A": memory_a,
    "time": time_step,
    "offload": offload,
    "memory-D": memory_d,
    "nf4": nf4,
    "streamed": streamed,
    "state": state,
    "overhead": overhead_step,
    "memory-S": memory_s,
    "compiled": compiled,
}
assert list(STEPS) == list(LIMITS)
