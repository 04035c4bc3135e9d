"""The Trainer's batches in micro-batches: chosen before the first step, cut in the data loader, added up exactly.

Idea: the loader goes on drawing the examples of a whole batch, so the order of the data, the number of steps and the
last, smaller batch of an epoch stay as they are. Its collator is called for each micro-batch alone, so packed,
padding-free and preference batches are cut as the trainer itself would make them. `training_step` then runs for one
micro-batch after the other. `num_items_in_batch` is counted by the Trainer over all of them, and where the loss is not
divided by it, each part's loss is weighed by what it is a mean of (`fitting.micro_batches.Weigher`).

Invariant: whatever reads a batch in the Trainer's loop finds the tokens of the whole one. Refused: a loader whose
collator never sees examples; `auto_find_batch_size`, which would choose too; what `fitting.micro_batches` refuses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from tightfit.core import InvalidInput, MicroBatches, Plan, Unsupported
from tightfit.engine.limits import lacking_in_host, within_device
from tightfit.fitting import micro_batches
from tightfit.integrations.longest import longest_batch, plain, telling_examples
from tightfit.plan.micro_batches import shares, slices
from tightfit.step.rows import row_count, rows_taken
from tightfit.step.run import device_of
from tightfit.trace.fake import logging_step
from tightfit.verify.additive import compared_cut

__all__ = ["InParts", "parts_of"]

#: Keys of a fetched batch: its micro-batches, and how many examples each has.
_PARTS, _ROWS = "tightfit_micro_batches", "tightfit_examples"


def parts_of(batch: Any) -> list[Any]:
    """The micro-batches of a batch that the loader gave; itself, if it is not cut."""
    return list(batch[_PARTS]) if isinstance(batch, Mapping) and _PARTS in batch else [batch]


class _Collate:
    """A collator that makes micro-batches. What the Trainer's loop counts, tokens, stands beside them, flat."""

    def __init__(self, collate: Callable[[list[Any]], Any], size: int, counted: tuple[str, ...]) -> None:
        self.collate, self.size, self.counted = collate, size, counted

    def __call__(self, examples: list[Any]) -> Any:
        rows = shares(len(examples), self.size)
        parts = [plain(self.collate(examples[part])) for part in slices(rows)]
        if len(parts) == 1:
            return parts[0]
        shown = [name for name in self.counted if all(isinstance(p.get(name), torch.Tensor) for p in parts)]
        return {name: torch.cat([part[name].flatten() for part in parts]) for name in shown} | {
            _PARTS: parts,
            _ROWS: list(rows),
        }


class InParts:
    """How one Trainer's batches are cut.

    Attributes: `chosen`, once it is; `cuts`: is a batch cut at all; `others`: what a step holds beside the micro-batch
    that is planned for.
    """

    def __init__(self, asked: str | int, exact: bool, batch_given: bool) -> None:
        self.asked = micro_batches.micro_batch_asked(asked)
        micro_batches.refuse_exact(exact)
        if batch_given:
            raise InvalidInput(
                "batch= is the micro-batch that is planned for, and micro_batch= asks for its size: give one"
            )
        self.chosen: MicroBatches | None = None
        self.cuts = False
        self.others: Any = None
        self._weigher = micro_batches.Weigher()
        self._patches = ExitStack()
        self._announced = False

    def announce(self, trainer: Any) -> None:
        """Before the loader is made: one batch for each optimizer step."""
        args = trainer.args
        if args.auto_find_batch_size:
            raise InvalidInput("auto_find_batch_size=True and batch='auto' both choose the batch size: leave one out")
        args.per_device_train_batch_size *= args.gradient_accumulation_steps
        args.gradient_accumulation_steps = 1
        trainer._train_batch_size = args.train_batch_size

    @property
    def said(self) -> str:
        """One line on the choice."""
        if self.chosen is None:
            return ""
        check = self.chosen.check
        return self.chosen.said + ("" if check is None else f"; cut and uncut are {check.measured}")

    def begin(self, callback: Any, loader: Any, optimizer: Any) -> tuple[Any, str]:
        """Choose, and cut from now on. Returns the micro-batch that is planned for, and what could not be seen.

        `callback.plan` and `callback.trace` are those of the choice.
        """
        trainer = callback._trainer
        model = trainer.model_wrapped
        micro_batches.refuse(model)
        base = getattr(loader, "base_dataloader", loader)
        if base.batch_sampler is None and base.batch_size is None:
            raise Unsupported("this data loader gives whole batches and no examples, so they cannot be cut")
        collate, whole = base.collate_fn, trainer._train_batch_size
        counted = (getattr(trainer.model, "main_input_name", "input_ids"), "attention_mask")
        batches: dict[int, tuple[Any, str]] = {}

        def others(cut: _Collate) -> Any:
            carried = longest_batch(SimpleNamespace(dataset=loader.dataset, collate_fn=cut), whole)[0]
            carried = transformers.Trainer._prepare_inputs(trainer, plain(carried))
            return [{k: v for k, v in carried.items() if k != _PARTS}, parts_of(carried)[1:]]

        def plan_for(size: int, budget: str | int, exact: bool) -> micro_batches.Planned:
            self.cuts = size < whole
            batch, unseen = longest_batch(SimpleNamespace(dataset=loader.dataset, collate_fn=collate), size)
            batch = transformers.Trainer._prepare_inputs(trainer, plain(batch))
            self.others = others(_Collate(collate, size, counted)) if self.cuts else None
            batches[size] = batch, unseen
            callback.plan = None
            if not exact:
                callback.plan = callback._plan_for(batch, model, optimizer, budget)
                return callback.trace, callback.plan, callback.plan.budget_bytes
            levers, beside = callback.allowed()
            return micro_batches.exactly(
                callback.record(batch, optimizer, tiles=micro_batches.needs_tiles(levers)), budget, levers, beside,
                callback.host_budget, lacking,
            )  # fmt: skip

        device = device_of(model)
        lacking = functools.partial(lacking_in_host, device=device, spilled=callback.spill is not None)
        self.cuts = False
        levers, beside = callback.allowed()
        assert not isinstance(callback.budget, Plan)  # a plan is not given together with micro-batches
        found = micro_batches.solve(
            whole, callback.budget, plan_for, levers, beside, self.asked, micro_batches.launch_seconds(device),
            host_budget=callback.host_budget, within=functools.partial(within_device, device=device), lacking=lacking,
        )  # fmt: skip
        size = found.chosen.size
        self.cuts = size < whole
        self.chosen = found.chosen
        callback.plan, callback.trace = found.plan, found.trace
        callback.plans += 1
        if self.cuts:
            self.others = None
            self._find_divisor(trainer, loader.dataset, collate)
            cut = _Collate(collate, size, counted)
            self.others = others(cut)
            self._cut(trainer, base, cut)
        else:
            self.others = None
        return batches[size]

    def _cut(self, trainer: Any, base: Any, cut: _Collate) -> None:
        before = base.collate_fn
        base.collate_fn = cut
        self._patches.callback(setattr, base, "collate_fn", before)
        self._patches.enter_context(_wrapped(trainer, "get_batch_samples", self._counted))
        self._patches.enter_context(_wrapped(trainer, "training_step", self._in_turn))

    def _counted(self, trainer: Any, fetch: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The Trainer counts the items of all micro-batches, as it would if it accumulated them."""
        batches, items = fetch(*args, **kwargs)
        parts = [part for batch in batches for part in parts_of(batch)]
        if len(parts) > len(batches):
            items = type(trainer).get_batch_samples(trainer, iter(parts), len(parts), trainer.args.device)[1]
        return batches, items

    def _in_turn(self, trainer: Any, step: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kw: Any) -> Any:
        parts = parts_of(inputs)
        if len(parts) == 1:
            return step(model, parts[0], *args, **kw)
        total = None
        for part, weight in zip(parts, self._weigher.weights(None, parts, inputs[_ROWS]), strict=True):
            if weight == 0:  # the mean of no labels is no number
                continue
            with _wrapped(trainer, "compute_loss", _scaled(weight)) if weight != 1 else ExitStack():
                loss = step(model, part, *args, **kw)
            total = loss if total is None else total + loss
        return total

    def _find_divisor(self, trainer: Any, dataset: Any, collate: Any) -> None:
        """What the trainer's loss divides by, and that cut and uncut are the same. Raises `Unsupported` if not."""
        examples = telling_examples(dataset, collate)
        prepare = transformers.Trainer._prepare_inputs
        whole = prepare(trainer, plain(collate(examples)))
        rows = (1, len(examples) - 1)
        try:
            aligned = row_count(whole) == len(examples)
        except Unsupported:
            aligned = False
        if aligned:  # of one draw of a collator that masks at random
            parts = [rows_taken(whole, slice(0, 1)), rows_taken(whole, slice(1, len(examples)))]
        else:
            parts = [prepare(trainer, plain(collate(each))) for each in (examples[:1], examples[1:])]
        held, check = self._compared(trainer, whole, parts, rows, self._weigher.divisors)
        if len(held) > 1 and aligned and "labels" in whole:
            # these examples do not tell what it is: some labels fewer in one of them do
            masked = whole["labels"].clone()
            masked[0, ..., masked.shape[-1] // 2 :] = -100
            told = whole | {"labels": masked}
            parts = [rows_taken(told, slice(0, 1)), rows_taken(told, slice(1, len(examples)))]
            held = self._compared(trainer, told, parts, rows, held)[0] or held
        if not held:
            raise Unsupported(micro_batches.not_additive(whole, check.measured, check.tolerance))
        self._weigher.divisors = held
        assert self.chosen is not None
        self.chosen = micro_batches.weighed(self.chosen, held[0], check)

    def _compared(self, trainer: Any, whole: Any, parts: Any, rows: Any, divisors: Any) -> Any:
        items = type(trainer).get_batch_samples(trainer, iter([whole]), 1, trainer.args.device)[1]
        if isinstance(items, torch.Tensor) and items.is_floating_point():
            items = items.double()  # a count; a step in float64 has it so

        def loss(model: Any, batch: Any) -> torch.Tensor:
            with trainer.compute_loss_context_manager(), logging_step():
                found: torch.Tensor = trainer.compute_loss(model, dict(batch), num_items_in_batch=items)
            return found

        model = trainer.model_wrapped
        own = set(model.modules())
        others = [each for each in vars(trainer).values() if isinstance(each, torch.nn.Module) and each not in own]
        beside = [each for each in others if model not in set(each.modules())]  # DPO's reference, a teacher
        return compared_cut(model, whole, parts, rows, loss, divisors, beside)

    def close(self) -> None:
        """The loader and the trainer as they were. Twice is once."""
        self._patches.close()
        self.others = None


def _scaled(weight: float) -> Callable[..., Any]:
    def compute_loss(trainer: Any, inside: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found = inside(*args, **kwargs)
        return (found[0] * weight, *found[1:]) if isinstance(found, tuple) else found * weight

    return compute_loss


@contextmanager
def _wrapped(trainer: Any, name: str, around: Callable[..., Any]) -> Iterator[None]:
    """`trainer.name` goes through `around`, until the context ends; what was put around it since then stays right."""
    inside, own = getattr(trainer, name), vars(trainer).get(name)

    def call(*args: Any, **kwargs: Any) -> Any:
        return around(trainer, inside, *args, **kwargs)

    setattr(trainer, name, call)
    try:
        yield
    finally:
        if vars(trainer).get(name) is call:
            if own is None:
                delattr(trainer, name)
            else:
                setattr(trainer, name, own)
