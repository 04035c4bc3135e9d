"""A `Trainer` callback that fits the step into a byte budget.

`TightfitCallback` traces the step that the Trainer is about to run, plans it for the budget, measures the planned peak,
proves the gradients on the first real batch and keeps the plan in force until the training ends. It serves TRL's
trainers too: what they compute is asked of them, not rebuilt here.

Invariant: the step that is traced and proven is the Trainer's own (`Trainer.compute_loss` on a batch that its own
collator made), and finding it moves no random state, no statistic and no setting that is saved, so losses and saved
files are those of a run without the callback, but for its figures in the log lines of `trainer_state.json`. Where
nothing exact fits (`Plan.exact`), the line says so.
Refused: what `tightfit.integrations.conflicts` names; a gradient that differs (`ReplayDiverged`).
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.utils import logging

from tightfit.core import (
    BudgetInfeasible,
    Check,
    Lever,
    LeversAsked,
    MicroBatches,
    Plan,
    Proof,
    ReplayDiverged,
    Trace,
    Unsupported,
    by_name,
    format_bytes,
    levers_named,
    parse_host_budget,
    parse_spill,
)
from tightfit.engine import Applied
from tightfit.engine.offload import Pool
from tightfit.fitting.micro_batches import cut_levers, gradients_in_place
from tightfit.fitting.planning import asked_in_vain, planned, what_is_given
from tightfit.integrations import conflicts, generated
from tightfit.integrations.clipping import in_two_passes, not_in_two_passes
from tightfit.integrations.longest import Extent, longest_batch, plain
from tightfit.integrations.micro_batches import InParts, parts_of
from tightfit.integrations.own_step import recorded as record_step
from tightfit.integrations.own_step import (
    replaced,
    running_trainer,
    statistics_kept,
    trainer_loss,
)
from tightfit.integrations.peaks import PeakCallback
from tightfit.integrations.tracking import figures
from tightfit.levers import exact_only, used
from tightfit.levers.state_in_host.host import loaded_on_host, settled
from tightfit.levers.step_in_backward.hooks import gradient_norms_kept, only_clipped
from tightfit.step.environment import environment
from tightfit.step.optimizers import bare
from tightfit.step.patches import no_key_value_cache
from tightfit.step.ranks import anywhere
from tightfit.step.run import leading_sizes, tensors_in, trained_names
from tightfit.verify.measure import every_block_checkpointed
from tightfit.verify.peak import PEAK_TOLERANCE, peak_checks
from tightfit.verify.proving import gradient_checks

__all__ = ["TightfitCallback"]

Batch = dict[str, Any]


class TightfitCallback(PeakCallback):
    """Fits the Trainer's step into `budget`: bytes (`"22GiB"`, an int) or a percentage of the unplanned step's peak.

        trainer = Trainer(model, args, train_dataset=data, callbacks=[TightfitCallback("60%")])

    It plans for the longest batch that the Trainer's collator makes of the data; a longer one (a stream's) is planned
    for anew, for the same bytes, before it runs. Of a trainer that generates its batches (TRL's GRPO) it plans for the
    first one, with the longest completions that the settings allow. `verify=True` measures the planned peak, and
    compares the gradients of the first real batch with and without the plan. `batch` overrides the batch that is
    planned for; give it when the data cannot be looked at before training. A step that trains other parameters than the
    one before (adapters that are switched, layers that are freed) is planned anew once, for the same bytes. `levers`:
    what the plan may use, as in `tightfit.plan`; by default what gives the same bits, and tiles, whose gradients are
    proven against float64, only where nothing else fits; `exact=True` forbids those. `beside`: levers with the default
    ones. The optimizer steps in backward by default where the Trainer neither clips (`max_grad_norm=0`), nor
    accumulates, nor scales gradients, and no callback looks at them. Where it clips, and `step_in_backward` is named,
    each training step runs twice under such a plan, the first time for the norms. `host_budget`: the most bytes that
    plans may have wait in host memory, a size or 0. `spill`: what waits does so in a file in that folder.
    `plan`: a plan of this step or its file, taken as it is. Its budget holds, unless another is given beside it.

    `batch="auto"` (or `micro_batch="auto"`; a number is the most examples of a micro-batch): each batch of the Trainer
    runs in micro-batches. Their size and the plan are solved together for the fewest seconds of a batch. Given to the
    Trainer's constructor, the callback makes one batch of `per_device_train_batch_size` and
    `gradient_accumulation_steps`. Data order, steps and schedule stay; losses and gradients are those of the uncut
    batch to rounding, which a few examples, cut and uncut, show. Dropout draws other masks.

    Checkpointing that TRL's configs or PEFT's `prepare_model_for_kbit_training` switched on by default is off while the
    plan is in force, and back afterwards.

    Attributes, readable after training too: `trace`, `plan`, `proof` (none before the first step, none without
    `verify`), `peaks` (bytes per step), `batch` (planned for), `plans` (how many were made), `said` (its lines),
    `micro_batches` (what was chosen; none: nothing was to be cut).

    Raises inside `trainer.train()`: `BudgetInfeasible`; `Unsupported` for a Trainer whose step cannot be planned;
    `ReplayDiverged` when the proof finds another gradient. After any exception the model is as it was.

    One thing because the Trainer calls one object at every point of a run.
    """

    def __init__(
        self,
        budget: str | int | None = None,
        *,
        verify: bool = True,
        batch: Any = None,
        levers: Collection[Lever | str] | str | None = None,
        exact: bool = False,
        beside: Collection[Lever | str] | str = (),
        micro_batch: str | int | None = None,
        host_budget: str | int | None = None,
        plan: Plan | str | Path | None = None,
        spill: str | Path | None = None,
    ) -> None:
        super().__init__()
        if isinstance(batch, str):  # as on the command line
            batch, micro_batch = None, batch
        self.budget, self.host_budget = what_is_given(budget, plan, micro_batch), parse_host_budget(host_budget)
        self.in_parts = None if micro_batch is None else InParts(micro_batch, exact, batch is not None)
        self.spill = parse_spill(spill)
        self.beside = levers_named(beside) or frozenset()
        self.levers, self.exact = levers_named(levers), exact
        self.verify = verify
        self.batch: Any = None if batch is None else plain(batch)
        self._given = batch is not None
        self.trace: Trace | None = None
        self.plan: Plan | None = None
        self.proof: Proof | None = None
        self.applied: Applied | None = None
        self.plans = 0
        self.said: list[str] = []
        self._trainer: Any = None
        self._extent = Extent()
        self._trained: frozenset[str] = frozenset()  # what the plan in force is for
        self._others: dict[frozenset[str], tuple[Plan, Trace | None]] = {}  # for the same batch, by what was trained
        self._peak_checks: tuple[Check, ...] = ()
        self._suspended: conflicts.Suspended | None = None
        self._cache, self._norms = ExitStack(), ExitStack()
        self._warned = False

    # -- planning

    @property
    def micro_batches(self) -> MicroBatches | None:
        return None if self.in_parts is None else self.in_parts.chosen

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.in_parts is not None:
            self.in_parts.announce(running_trainer())
        self.watch_loading(running_trainer())

    def watch_loading(self, trainer: Any) -> None:
        """Have `trainer` load a checkpoint's optimizer state into host memory, where a plan may have it wait: all of it
        may be more than the device holds, and it is loaded before training begins. A callback that the Trainer's
        constructor is given does this by itself."""
        if Lever.STATE_IN_HOST in (self.levers or frozenset()) | self.beside | self._given_levers:
            load = trainer._load_optimizer_and_scheduler
            trainer._load_optimizer_and_scheduler = functools.partial(self._load_to_host, trainer, load)

    def _load_to_host(self, trainer: Any, load: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        watched = self in trainer.callback_handler.callbacks
        with loaded_on_host(bare(trainer.optimizer)) if watched else nullcontext():
            return load(*args, **kwargs)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()
        trainer = running_trainer()
        conflicts.refuse(trainer, kwargs["model"])
        model = trainer.model_wrapped
        super().on_train_begin(args, state, control, **kwargs)
        self._trainer = trainer
        self.plan = self.proof = self.trace = None
        self.plans, self.said, self._warned, self._peak_checks = 0, [], False, ()
        try:
            self._suspended = conflicts.Suspended(trainer, model)
            self._say(state, self._suspended.said)
            unseen = ""
            generated.refuse(trainer, self.in_parts is not None)
            if generated.generates(trainer):
                watch = generated.with_batches(self._at_rest, self._generated, trainer)
                self._patches.enter_context(replaced(trainer, "_prepare_inputs", watch))
                if not self._given:  # planned when the first batch is there
                    return
            if self.in_parts is not None:
                with self._in_training(model):
                    self.batch, unseen = self.in_parts.begin(self, kwargs["train_dataloader"], kwargs["optimizer"])
                self._say(state, self.in_parts.said)
            elif not self._given:
                size = getattr(trainer, "_train_batch_size", args.train_batch_size)
                self.batch, unseen = longest_batch(kwargs["train_dataloader"], size)
                self.batch = generated.prepared(trainer, self.batch)
            if unseen:
                self._say(
                    state, f"planned for the longest of {unseen}; a longer batch will be planned for when it comes"
                )
            self._extent = generated.extent_of(self.batch)
            self._planned_first(model, kwargs["optimizer"])
        except BudgetInfeasible as error:
            self.close()
            if (
                args.auto_find_batch_size and trainer._train_batch_size > 1
            ):  # what it retries with half the batch is told by these words
                raise torch.OutOfMemoryError(f"tightfit: out of memory. {error}") from error
            raise
        except BaseException:
            self.close()
            raise

    def _planned_first(self, model: nn.Module, optimizer: Any) -> None:
        self._trained, self._others = trained_names(model), {}
        with self._in_training(model):
            chosen = self.plan or self._plan_for(self.batch, model, optimizer)
            for line in asked_in_vain(model, self.trace, self.budget, self.levers, self.beside):
                self._warn(line)
            if Lever.STATE_IN_HOST.value not in chosen.settings:
                settled(bare(optimizer))
            if self.verify:
                planned = self._step(self.batch)
                with gradients_in_place(model, self._accumulates):
                    limit = self._trainer.args.max_grad_norm or None
                    self._peak_checks = peak_checks(model, planned, chosen, self._loss(), bare(optimizer), limit)

    @property
    def _accumulates(self) -> bool:
        cut = self.in_parts is not None and self.in_parts.cuts
        return cut or self._trainer.args.gradient_accumulation_steps > 1

    def record(self, batch: Batch, optimizer: Any, tiles: bool) -> Trace:
        """The Trainer's step on `batch`, as its later micro-batches find it."""
        model = self._trainer.model_wrapped
        with gradients_in_place(model, self._accumulates):
            made = record_step(model, self._step(batch), self._loss(), bare(optimizer), tiles)
        if self._clips and made.optimizer is not None:
            made = dataclasses.replace(made, optimizer=dataclasses.replace(made.optimizer, clipped=True))
        sizes, examples = leading_sizes(batch), self._trainer._train_batch_size  # without what is held beside it
        if sizes and set(sizes) == {2 * examples}:  # an example is a pair, whose two sequences are two rows
            sizes = (examples,) * len(sizes)
        return dataclasses.replace(made, batch_sizes=sizes)

    @property
    def _given_levers(self) -> frozenset[Lever]:
        """Of the plan that was given, where one was."""
        return frozenset(each.lever for each in used(self.budget)) if isinstance(self.budget, Plan) else frozenset()

    def allowed(self) -> tuple[frozenset[Lever] | None, frozenset[Lever]]:
        """The levers that the plan may use, and those beside the default ones."""
        cuts = self.in_parts is not None and self.in_parts.cuts
        levers, others = cut_levers(self.levers, self.beside, cuts)
        reads = self._reads_gradients() or (not_in_two_passes(self._trainer) if self._clips else "")
        if reads and Lever.STEP_IN_BACKWARD in (others | (levers or frozenset()) | self._given_levers):
            raise Unsupported(
                f"step_in_backward was asked for, but {reads} needs the gradients after backward: leave one of the two "
                "out"
            )
        by_default = levers is None and not reads and not self._clips
        more = {Lever.STEP_IN_BACKWARD} if by_default else set()
        return levers, LeversAsked(others | more, by_name(others))

    @property
    def _clips(self) -> bool:
        return bool(self._trainer.args.max_grad_norm)

    def _plan_for(self, batch: Batch, model: nn.Module, optimizer: Any, budget: str | int | None = None) -> Plan:
        """Trace the step on `batch` and plan it: for `budget` at first, for the same bytes later."""
        recorded: Trace | None = None

        def record(tiles: bool) -> Trace:
            nonlocal recorded
            recorded = self.record(batch, optimizer, tiles)
            return recorded

        levers, beside = self.allowed()
        if self.plan is not None and self.plan.exact:
            # in the middle of a training nothing is proven anew, so only what gives the same bits by design
            levers = LeversAsked(exact_only(levers) | beside, by_name(levers) | by_name(beside))
            beside = frozenset()
        made = functools.partial(
            planned, levers=levers, model=model, exact=self.exact, beside=beside, host_budget=self.host_budget,
            spilled=self.spill is not None,
        )  # fmt: skip
        try:
            asked = budget or (self.budget if self.plan is None else self.plan.budget_bytes)
            _, chosen = made(record, asked)
        except BudgetInfeasible as error:
            if self.plan is None or recorded is None:
                raise
            # in the middle of a training: the leanest plan there is, and a word about it, rather than an end
            seen: Trace = recorded
            _, chosen = made(lambda _: seen, error.least_bytes)
            self._warn(f"{error}; this batch runs under the leanest plan")
        self.trace, self.plan = recorded, chosen
        self.plans += 1
        return chosen

    def _reads_gradients(self) -> str:
        """What in this Trainer's loop needs the gradients after backward; empty: nothing."""
        args = self._trainer.args
        if self.in_parts is not None and self.in_parts.cuts:
            return "micro_batch"
        if args.gradient_accumulation_steps > 1:
            return "gradient_accumulation_steps"
        if getattr(self._trainer.accelerator, "scaler", None) is not None:
            return "fp16"
        for each in self._trainer.callback_handler.callbacks:
            kind = type(each)
            reads = kind.on_pre_optimizer_step is not TrainerCallback.on_pre_optimizer_step
            if reads and not kind.__module__.startswith("tightfit."):
                return type(each).__name__
        return ""

    def _step(self, batch: Batch) -> dict[str, Any]:
        """What the step on `batch` holds: the batch, those that wait beside it, and other models' weights."""
        waiting = self._trainer.args.gradient_accumulation_steps - 1
        if generated.generates(self._trainer):
            waiting = generated.waiting_batches(self._trainer)
        others = [] if self.in_parts is None else tensors_in(self.in_parts.others)
        return {
            "batch": batch,
            "beside": [*self._beside, *others, *(t.clone() for _ in range(waiting) for t in tensors_in(batch))],
        }

    def _loss(self) -> Callable[[nn.Module, Any], torch.Tensor]:
        return trainer_loss(self._trainer)

    @contextmanager
    def _in_training(self, model: nn.Module) -> Iterator[None]:
        """The model and the Trainer as in a training step, and as before afterwards."""
        modes = [(m, m.training) for m in model.modules()]
        model.train()
        try:
            with no_key_value_cache(model), statistics_kept(self._trainer):
                yield
        finally:
            for module, training in modes:
                module.training = training

    def change_to(self, plan: Plan) -> None:
        """Go on under another plan of the same trace."""
        self.plan = plan
        if self.applied is not None:
            self.applied.suspend()
            self.applied.resume(plan, self.trace)

    # -- steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer is not None and self.plan is None and generated.generates(self._trainer):
            self._cache.enter_context(no_key_value_cache(self._trainer.model_wrapped))
            super().on_step_begin(args, state, control, **kwargs)
            return
        if self.plan is None or self._trainer is None:
            raise Unsupported("TightfitCallback was added in the middle of a training: give it before trainer.train()")
        model = self._trainer.model_wrapped
        # on only while a step runs: a config that is saved in between says what the user's says
        self._cache.enter_context(no_key_value_cache(model))
        longer = self._longer_batch()
        if anywhere(model, longer is not None)[0]:  # what one rank plans anew, all do
            self._replan(self.batch if longer is None else longer, state, **kwargs)
        if self.applied is None:
            self._prove(state, model)
            self._in_force(model, kwargs["optimizer"])
        super().on_step_begin(args, state, control, **kwargs)

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        """No plan is in force and nothing is counted: batches are being generated, or another plan is made."""
        trainer, within = self._trainer, self._meter is not None
        self._paused()
        self._cache.close()
        if self.applied is not None:
            self.applied.suspend(keep_optimizer=True)
        try:
            yield
        finally:
            if self.applied is not None and self.plan is not None:
                self.applied.suspend(keep_optimizer=True)  # where a longer batch was planned for meanwhile
                self.applied.resume(self.plan, self.trace, agreed=True)
        if within:
            self._cache.enter_context(no_key_value_cache(trainer.model_wrapped))
            batches = getattr(trainer, "_buffered_inputs", None) if generated.generates(trainer) else self._upcoming
            self._counting(trainer.args, bare(trainer.optimizer), batches)

    def _generated(self, inputs: Batch) -> None:
        """A batch to train on has been generated: it is planned for, if it is the first or longer than any before."""
        trainer = self._trainer
        longest = generated.longest_completions(inputs, trainer)
        extent = generated.extent_of(longest)
        if self.plan is None:
            self.batch, self._extent = longest, extent
            self._planned_first(trainer.model_wrapped, trainer.optimizer)
            self._prove(trainer.state, trainer.model_wrapped, inputs)
            self._in_force(trainer.model_wrapped, trainer.optimizer)
        elif extent.exceeds(self._extent):
            self._extent = self._extent.joined(extent)
            self._replan(longest, trainer.state, optimizer=trainer.optimizer)

    def _longer_batch(self) -> Batch | None:
        longest = None
        for batch in (part for whole in self._upcoming for part in parts_of(whole)):
            extent = Extent.of(batch)
            if extent.exceeds(self._extent):
                self._extent = self._extent.joined(extent)
                longest = batch
        return longest

    def _replan(self, batch: Any, state: Any, **kwargs: Any) -> None:
        model, before = self._trainer.model_wrapped, (self.plan, self.trace)
        if self.applied is not None:
            self.applied.suspend()
        prepared = generated.prepared(self._trainer, batch)
        with self._in_training(model):
            new = self._plan_for(prepared, model, kwargs["optimizer"])
        old = before[0]
        assert old is not None
        if not anywhere(model, new.unplanned_peak_bytes > old.unplanned_peak_bytes)[0]:
            self.plan, self.trace = before  # longer in one way and shorter in another: the old plan is the safer one
        else:
            self.batch, self._others = prepared, {}
            self._say(
                state,
                f"step {state.global_step + 1} brings a longer batch than any before; planned anew for "
                f"{format_bytes(new.budget_bytes)}: predicted peak {format_bytes(new.peak_bytes)}",
            )
        if self.applied is not None:
            assert self.plan is not None
            self.applied.resume(self.plan, self.trace)

    def _before_forward(self, model: nn.Module, *_: Any) -> None:
        """Other parameters may be trained than before (adapters, layers that are freed), so other tensors are saved:
        each set has its plan. Callbacks change that when a step begins, after this one was told of it."""
        if not (model.training and torch.is_grad_enabled()) or self.plan is None:
            return
        trained = trained_names(model)
        if trained == self._trained or not trained:
            return
        self._others[self._trained] = self.plan, self.trace
        self._trained = trained  # from here on the steps that are run to plan are none to plan for
        if trained in self._others:
            self.plan, self.trace = self._others[trained]
            assert self.applied is not None
            self.applied.exchange(self.plan, self.trace)
            return
        state = self._trainer.state
        with self._at_rest(), self._in_training(model):
            new = self._plan_for(self.batch, model, self._trainer.optimizer)
        self._say(
            state,
            f"step {state.global_step + 1} trains other parameters than before; planned anew for "
            f"{format_bytes(new.budget_bytes)}: predicted peak {format_bytes(new.peak_bytes)}",
        )

    def _in_force(self, model: nn.Module, optimizer: Any) -> None:
        assert self.plan is not None
        self._norms.enter_context(gradient_norms_kept())  # which the Trainer logs
        self._norms.callback(model.register_forward_pre_hook(self._before_forward).remove)
        self.applied = Applied(model, self.plan, self.trace, pool=Pool(spill=self.spill), optimizer=bare(optimizer))
        if self._clips and Lever.STEP_IN_BACKWARD in {*(self.levers or ()), *self.beside, *self._given_levers}:
            twice = functools.partial(in_two_passes, self._trainer)
            self._norms.enter_context(replaced(self._trainer, "training_step", twice))
            only_clipped(bare(optimizer), True)
            self._norms.callback(only_clipped, bare(optimizer), False)

    def _prove(self, state: Any, model: nn.Module, batch: Any = None) -> None:
        if not self.verify:
            return
        if batch is None and self._upcoming and not generated.generates(self._trainer):
            batch = generated.prepared(self._trainer, parts_of(self._upcoming[0])[0])
        batch = self.batch if batch is None else batch
        assert self.plan is not None
        with self._in_training(model):
            loss, step = self._loss(), self._step(batch)
            try:
                found = gradient_checks(model, step, self.plan, loss=loss)
                beside = "the plain step's"
            except torch.OutOfMemoryError:
                # the usual reason to want a budget; torch's own checkpointing has the plain step's gradients too
                model.zero_grad(set_to_none=True)
                paths = [choice.unit for choice in self.plan.choices]
                found = gradient_checks(
                    model, step, self.plan, loss=loss, reference=lambda: every_block_checkpointed(model, paths)
                )
                beside = "those of torch's checkpointing"
        self.proof = Proof(checks=(*found, *self._peak_checks), environment=environment())
        check = self.proof["gradients"]
        peak = next((c.measured for c in self._peak_checks if c.name == "prediction"), "not measured")
        if not check.passed:
            raise ReplayDiverged(
                f"the plan changes the gradients of this model (expected {check.expected}, found {check.measured}), "
                "so it was not applied"
            )
        self._say(
            state,
            f"budget {format_bytes(self.plan.budget_bytes)}, predicted peak {format_bytes(self.plan.peak_bytes)}, "
            f"measured {peak}; gradients of the first batch: {check.measured} to {beside}"
            + ("" if self.plan.exact else "; not bit for bit, since only tiles fit this budget"),
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        self._cache.close()
        if self.plan is None:  # added in the middle of a step; the next one says so
            return
        if self.peaks and self.peaks[-1] > self.plan.budget_bytes * (1 + PEAK_TOLERANCE) and not self._warned:
            self._warned = True
            self._say(
                state,
                f"step {state.global_step} reached {format_bytes(self.peaks[-1])}, more than the budget of "
                f"{format_bytes(self.plan.budget_bytes)}: something beside the planned step takes memory",
            )

    def _figures(self) -> dict[str, float]:
        return figures(self.plan, self.proof, self.peaks[self._logged :])

    def _warn(self, line: str) -> None:
        self._say(self._trainer.state, line)

    def _say(self, state: Any, line: str) -> None:
        """One line on stderr, above a progress bar rather than through it; from the first process only."""
        if not line:
            return
        self.said.append(line)
        if state.is_world_process_zero and logging.get_verbosity() < logging.ERROR:
            tqdm.write(f"tightfit: {line}", file=sys.stderr)

    def close(self) -> None:
        """Take the plan off the model and put back what was switched off for it. Twice is once."""
        super().close()
        if self.applied is not None:
            self.applied.remove()
            self.applied = None
        if self._trainer is not None:
            settled(bare(self._trainer.optimizer))
        self._cache.close()
        self._norms.close()
        if self.in_parts is not None:
            self.in_parts.close()
        if self._suspended is not None:
            self._suspended.restore()
            self._suspended = None
        self._trainer = None
