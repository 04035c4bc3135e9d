"""The passes over one step: dry, full and measured, and once more for each lever that changes the step's ops (tiles).

Invariant: every pass starts from the same state and runs the same ops. Refused: steps of which that is not true
(`Unsupported`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Container, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import nn

from tightfit import accelerator, levers
from tightfit.core import (
    Category,
    EventKind,
    Lever,
    Phase,
    Timeline,
    Trace,
    Unsupported,
)
from tightfit.device.cost import retimed
from tightfit.levers.loss_in_place.by_rows import folds_told
from tightfit.levers.loss_in_place.loss import watched
from tightfit.plan import Effort, every_block
from tightfit.plan.simulate import simulate_choices
from tightfit.step.parallel import (
    Strategy,
    gradients_are_views,
    resizes_told,
    strategy_of,
)
from tightfit.step.patches import MethodPatch
from tightfit.step.ranks import run_together
from tightfit.step.run import (
    LossFunction,
    batch_tensors,
    compute_loss,
    cpu_profile,
    device_of,
    static_bytes_by_category,
)
from tightfit.step.snapshot import Snapshot
from tightfit.step.tied import tied_gradients
from tightfit.trace.assembly import Assembly
from tightfit.trace.fake import FakeStep
from tightfit.trace.optimizer import OptimizerRecord, behind
from tightfit.trace.profiler import Timer, risen_bytes, run_by
from tightfit.trace.recorder import Recorder
from tightfit.trace.timing import (
    Pace,
    Sample,
    Stopwatch,
    fitted,
    fresh_seconds_per_byte,
    in_doubt,
    is_disturbed,
    is_short,
    on_one_thread,
    spread,
)
from tightfit.trace.units import Census
from tightfit.trace.weights import WeightsWatch, watches_weights
from tightfit.trace.without_mode import as_without_mode, scratch_from


def custom_functions(result: torch.Tensor) -> frozenset[str]:
    """The names of the `torch.autograd.Function`s in the history of `result` that are not torch's own."""
    found: set[str] = set()
    seen: set[Any] = set()
    pending: list[Any] = [result.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            function = node._forward_cls  # type: ignore[attr-defined]
            if not function.__module__.startswith(("torch.", "tightfit.")):
                found.add(function.__name__)
        pending += [following for following, _ in node.next_functions]
    return frozenset(found)


def _custom_note(functions: frozenset[str]) -> tuple[str, ...]:
    # no number of calls: the step may be an excerpt of a deeper model's
    if not functions:
        return ()
    return (f"custom autograd functions, whose ops are recorded and rerun one by one: {', '.join(sorted(functions))}",)


def first_pass(
    model: nn.Module,
    batch: Any,
    loss: LossFunction | None,
    modules: Mapping[str, nn.Module],
    restart: Callable[[], None],
    fake: FakeStep | None,
    census: Census | None = None,
) -> tuple[Recorder, dict[Lever, Any]]:
    """Run the dry pass with `modules` as units. Returns it with what each lever saw of it."""
    restart()
    with contextlib.ExitStack() as watches:
        paths = list(modules)
        seen = {
            each.lever: watches.enter_context(each.watching(model, paths, fake is not None)) for each in levers.every()
        }
        dry = record_pass(model, batch, loss, modules, restart, dry=True, fake=fake, census=census)
    return dry, seen


@dataclass
class StepRecording:
    """The step while it is recorded: once as it is, and once more for each lever that changes its ops."""

    model: nn.Module
    batch: Any
    loss: LossFunction | None
    modules: Mapping[str, nn.Module]
    restart: Callable[[], None]
    fake: FakeStep | None
    tail: OptimizerRecord | None
    pace: Pace | None = None  # of the step as it is, for what it becomes under a lever too

    def dry(self) -> Recorder:
        self.restart()
        return record_pass(self.model, self.batch, self.loss, self.modules, self.restart, dry=True, fake=self.fake)

    def first(self, dry: Recorder) -> Trace:
        """The trace of the step as it is, after its dry pass. A model's first forward may do more than its later ones:
        what it sets up stays, so it is recorded once more."""
        try:
            return self.recorded(dry)
        except _Unlike:
            return self.recorded(self.dry())

    def again(self, opened: AbstractContextManager[Any], is_refused: Callable[[], bool]) -> Trace | None:
        """The step, recorded with `opened` around it. None where `is_refused` says so after its forward."""
        with opened:
            dry = self.dry()
            return None if is_refused() else self.recorded(dry, anew=True)

    def unplanned(self, trace: Trace) -> Timeline:
        """The referee's walk through `trace` without a plan."""
        return simulate_choices(trace, ())

    def every_block(self, trace: Trace) -> Timeline:
        """The referee's walk through `trace` with every unit recomputed."""
        effort = Effort(points=4, solver_seconds=0.2, proves=False)
        return simulate_choices(trace, every_block(trace, effort=effort).choices)

    def recorded(self, dry: Recorder, *, anew: bool = False) -> Trace:
        """The trace of the step as it runs now, after its dry pass. `anew`: it was recorded before, in another way."""
        model, fake = self.model, self.fake
        self.restart()
        static = static_bytes_by_category(model, self.batch, granule_bytes=1 if fake is None else fake.granule_bytes)
        if fake is not None:
            fake.forget_calls()
        # on the CPU a step that is recorded anew needs no measured pass of its own: its ops are timed elsewhere too
        at_once = fake is None and anew and accelerator.is_host(device_of(model))
        full = record_pass(
            model, self.batch, self.loss, self.modules, self.restart, dry=False, fake=fake, measured=at_once
        )  # fmt: skip
        gradients = {
            v for p in model.parameters() if p.grad is not None for v in [full.value_of(p.grad)[0]] if v is not None
        }
        full.recording = False
        if gradients_are_views(model):
            _into_buckets(full, gradients)
        _same_ops("the dry pass", [c.name for c in dry.calls], [c.name for c in full.calls if c.phase is Phase.FORWARD])
        for call, other in zip(full.calls, dry.calls, strict=False):
            call.samples += other.samples
        notes = _custom_note(full.custom)
        if fake is not None:
            for number, size_bytes in fake.scratch_bytes().items():
                full.calls[number].scratch_bytes = size_bytes
            static[Category.WORKSPACE.value] = fake.workspace_bytes
            notes += fake.notes
        elif not at_once:
            self.restart()
            _measure(model, self.batch, self.loss, full)
            if line := accelerator.peak_unknown(device_of(model)):
                notes += (f"bytes that kernels use inside are taken to be none: {line}",)
        whole = None if fake is not None else self._time_again(full, anew)
        seconds = fitted(full.equals())
        if whole is not None:
            self.pace = Pace.of(seconds, whole)
        if self.pace is not None:
            seconds = self.pace.paced(seconds)
        assembly = Assembly(model, self.batch, dry, full, self.modules, static, gradients, fake, notes, seconds)
        trace = assembly.trace()
        if fake is not None:
            trace = retimed(trace, assembly.target)
        elif whole is not None:
            risen_bytes = self.unplanned(trace).peak_bytes - sum(trace.static_bytes.values())
            rate = fresh_seconds_per_byte(full.equals(), whole, risen_bytes)
            trace = dataclasses.replace(trace, fresh_seconds_per_byte=rate)
        return trace if self.tail is None else behind(trace, self.tail)

    def _time_again(self, full: Recorder, anew: bool) -> Sample | None:
        """Run the step for its ops' seconds alone, as often as their timings ask for. Timings that other processes
        disturbed are made anew, on one thread. Where they are not, the whole step is timed, too, and that timing
        returned. Several processes run the step equally often, whatever each of them sees: it may have them meet."""
        if run_together():
            return None
        timed = full.equals()
        short = is_short(timed)
        alone = not short and is_disturbed(timed)
        for call in full.calls if alone else ():
            call.samples.clear()
        for _ in range(0 if short else _MORE_PASSES):
            if not in_doubt(full.equals()):
                break
            self.restart()
            with on_one_thread() if alone else contextlib.nullcontext(), Timer(device_of(self.model)) as timer:
                compute_loss(self.model, self.batch, self.loss).backward()
            names = list(compress(timer.names, timer.finished))
            _same_ops("a timed pass", names, [c.name for c in full.dispatched])
            for call, sample in zip(full.dispatched, timer.samples, strict=True):
                call.samples.append(spread(sample) if alone else sample)
        if anew or alone or not accelerator.is_host(device_of(self.model)):
            return None
        return self._whole()

    def _whole(self) -> Sample:
        """A timing of the whole step, in which nothing is watched."""
        self.restart()
        watch = Stopwatch(device_of(self.model))
        watch.start()
        compute_loss(self.model, self.batch, self.loss).backward()
        return watch.stop()


#: So many runs more at most, where timings scatter.
_MORE_PASSES = 4


def record_pass(
    model: nn.Module,
    batch: Any,
    loss: LossFunction | None,
    modules: Mapping[str, nn.Module],
    restart: Callable[[], None],
    *,
    dry: bool,
    fake: FakeStep | None,
    measured: bool = False,
    census: Census | None = None,
) -> Recorder:
    """Run and record one pass. `measured`: the pass also measures each op's scratch bytes (on the CPU). `census`: it is
    told of every value."""
    recorder = Recorder(dry=dry, fake=fake)
    recorder.census = census
    if fake is None and accelerator.is_host(device_of(model)):  # on a card ops are timed alone, by `_measure`
        recorder.stopwatch = Stopwatch(device_of(model))
    recorder.restart = restart if isinstance(restart, Snapshot) else None
    for tensor in [*model.parameters(), *model.buffers(), *batch_tensors(batch)]:
        recorder.value_of(tensor._values() if tensor.layout is torch.sparse_coo else tensor)
    weights = WeightsWatch(recorder, model) if watches_weights(model) else None
    for parameter in model.parameters():
        if parameter.grad is not None:
            recorder.value_of(parameter.grad)
    patches = [MethodPatch(module, functools.partial(recorder.frame_forward, path)) for path, module in modules.items()]

    patches += [] if dry or weights is None else weights.patches()

    # several processes have their gradients reduced first
    told = [] if dry or strategy_of(model) is not Strategy.ONE else [p for p in model.parameters() if p.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(recorder.ready) for parameter in told if parameter.is_leaf]

    def note_cross_entropy(entered: bool) -> None:
        recorder.in_cross_entropy = entered

    profiler: Any = None
    if measured:
        recorder.marks = True
        profiler = cpu_profile()
    try:
        with (
            folds_told(recorder.working_by_rows),
            profiler or contextlib.nullcontext(),
            resizes_told(recorder.resized),
            contextlib.nullcontext() if not told else tied_gradients(model, recorder.note_tied),
            recorder,
        ):
            with (
                torch.autograd.graph.saved_tensors_hooks(recorder.pack, recorder.unpack),
                watched(note_cross_entropy),
            ):
                result = compute_loss(model, batch, loss)
            if dry:
                recorder.recording = False
            else:
                recorder.custom = custom_functions(result)
                recorder.phase = Phase.BACKWARD
                if fake is None:
                    result.backward()
                else:
                    _backward_marked(result, recorder)
                del result
        if measured:
            recorder.recording = False
            scratch_from(recorder, profiler)
    except RuntimeError as error:
        if "saved tensor hooks" in str(error):
            raise Unsupported(
                "the model calls torch.func.grad or another of its transforms, under which torch cannot tell what "
                "autograd saves, so the step cannot be traced"
            ) from error
        raise
    finally:
        for patch in reversed(patches):
            patch.undo()
        for hook in hooks:
            hook.remove()
    if not dry and weights is not None:
        recorder.frozen = weights.found
    return recorder


def _backward_marked(result: torch.Tensor, recorder: Recorder) -> None:
    """Run backward on fake tensors. Nothing is summed in place there, so the profile tells what would have been."""
    first = len(recorder.dispatched)
    recorder.marks = True
    with cpu_profile(memory=False) as profiler:
        result.backward()
    recorder.marks = False
    count = len(recorder.dispatched) - first
    step = recorder.fake
    on_host = step is not None and not step.cuda
    as_without_mode(recorder, [""] * first + run_by(profiler, count), on_host=on_host)


def _measure(model: nn.Module, batch: Any, loss: LossFunction | None, full: Recorder) -> None:
    """Run the step once more, for its seconds and for each op's scratch bytes by the allocator's own count."""
    timer = Timer(device_of(model))
    profiler = cpu_profile(memory=not timer.has_queue)
    with profiler, timer:
        compute_loss(model, batch, loss).backward()
    calls, finished = full.dispatched, timer.finished
    _same_ops("the measured pass", list(compress(timer.names, finished)), [c.name for c in calls])
    risen = timer.risen_bytes if timer.has_queue else compress(risen_bytes(profiler, len(finished)), finished)
    nodes = list(compress(run_by(profiler, len(finished)), finished))
    as_without_mode(full, nodes, on_host=not timer.has_queue)
    for call, sample, rise in zip(calls, timer.samples, risen, strict=True):
        call.samples.append(sample)
        call.scratch_bytes = max(0, rise - call.out_bytes)


def _into_buckets(full: Recorder, gradients: Container[int]) -> None:
    """DDP copies each gradient into its bucket as soon as it is there, and lets go of it."""
    last: dict[int, int] = {}
    for at, (what, subject) in enumerate(full.events):
        if what is EventKind.OP:
            call = full.calls[subject]
            last.update((v, at) for v in (*(v for v, _ in call.reads), *call.writes, *call.fresh) if v in gradients)
    for value, at in sorted(last.items(), key=lambda item: -item[1]):
        if full.storages[value].producer is not None:
            full.events.insert(at + 1, (EventKind.FREE, value))


class _Unlike(Unsupported):
    """Two passes ran different ops."""


def _same_ops(which: str, found: list[str], expected: list[str]) -> None:
    if found == expected:
        return
    at = next(
        (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), min(len(found), len(expected))
    )
    names = [names[at] if at < len(names) else "the end" for names in (found, expected)]
    raise _Unlike(
        f"the step is not the same twice: op {at} of {which} is {names[0]}, in the recorded pass {names[1]}; "
        "a step that changes from run to run on the same batch and random state cannot be planned"
    )
