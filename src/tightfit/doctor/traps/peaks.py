"""Peaks that checkpointing does not reach: logits, and the temporaries of a foreach optimizer."""

from __future__ import annotations

from typing import Any

import torch

from tightfit.accelerator import HOST
from tightfit.core import Category, format_bytes
from tightfit.doctor.peak import NOTHING, Why
from tightfit.doctor.run import Run, is_true
from tightfit.doctor.traps.trap import Seen, Trap, bites, not_here, peak_of, tiny_batch, tiny_model
from tightfit.verify.measure import every_block_checkpointed
from tightfit.verify.peak import PeakMeter


def _probe_logits() -> Seen:
    batch = tiny_batch(2, 64)
    peaks = {}
    for vocabulary in (64, 8192):
        model = tiny_model(layers=4, vocab_size=vocabulary)
        for parameter in (model.get_input_embeddings().weight, model.lm_head.weight):
            parameter.requires_grad_(False)  # their gradients have the vocabulary's size too
        peak_of(model, batch, use_cache=False)
        peaks[f"{vocabulary}_plain_bytes"] = peak_of(model, batch, use_cache=False)
        with every_block_checkpointed(model):
            peaks[f"{vocabulary}_checkpointed_bytes"] = peak_of(model, batch, use_cache=False)
    saved = {v: 1 - peaks[f"{v}_checkpointed_bytes"] / peaks[f"{v}_plain_bytes"] for v in (64, 8192)}
    told = (
        f"every block of a 4-layer Llama checkpointed: the step's peak falls by {saved[64]:.0%} with a vocabulary of "
        f"64 and by {saved[8192]:.0%} with one of 8,192"
    )
    return (bites if saved[8192] < saved[64] / 2 else not_here)(told, **peaks)


def _logits_run(run: Run) -> Seen | None:
    if is_true(run.get("use_liger_kernel")):
        return not_here("Liger's fused loss never makes the logits whole (use_liger_kernel)")
    return None


#: What checkpointing can be hoped to lower, or what stands in its way.
_MOVING = (Category.SAVED, Category.LOSS, Category.TEMPORARIES)


def _logits_peak(why: Why) -> Seen | None:
    line = why.checkpointed
    moving = {category.value: line.by_category[category.value] for category in _MOVING}
    loss = moving[Category.LOSS.value]
    figures = {"loss_bytes": loss, "peak_bytes": line.peak_bytes}
    told = f"with every block checkpointed the peak is {format_bytes(line.peak_bytes)}, at: {line.owner}"
    if not why.whole_logits:
        chunks = (
            f"the trainer's loss works in chunks and never makes the logits whole; {format_bytes(loss)} are its own"
        )
        return not_here(f"{told}; {chunks}", **figures)
    if loss == max(moving.values()) and loss > NOTHING * line.peak_bytes and line.phase != "optimizer":
        return bites(f"{told}; loss and logits hold {format_bytes(loss)} of it", **figures)
    return not_here(f"{told}; loss and logits hold {format_bytes(loss)} of it", **figures)


def _optimizer_rise(**said: Any) -> tuple[int, int]:
    """(what one AdamW step adds at most, the parameters' bytes)."""
    parameters = [torch.zeros(128, 128, requires_grad=True) for _ in range(16)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(parameters, **said)
    optimizer.step()
    with PeakMeter(HOST) as meter:
        optimizer.step()
    return meter.rise_bytes, sum(p.numel() * p.element_size() for p in parameters)


def _probe_foreach() -> Seen:
    (foreach, size), (loop, _), (fused, _) = (
        _optimizer_rise(**said) for said in ({"foreach": True}, {"foreach": False}, {"fused": True})
    )
    figures = {"parameter_bytes": size, "foreach_bytes": foreach, "loop_bytes": loop, "fused_bytes": fused}
    told = (
        f"one AdamW step over {format_bytes(size)} of parameters adds {format_bytes(foreach)} with foreach, "
        f"{format_bytes(loop)} in a loop, {format_bytes(fused)} fused"
    )
    return (bites if foreach > 2 * max(loop, fused) else not_here)(
        f"{told} (a plain torch.optim on a GPU is foreach)", **figures
    )


def _foreach_peak(why: Why) -> Seen | None:
    if why.setup is None:  # the caller's own optimizer
        owner = why.checkpointed.owner
        if why.checkpointed.phase == "optimizer" and "_foreach" in owner:
            return bites(f"the peak, {format_bytes(why.checkpointed.peak_bytes)}, is in the {owner}")
        return not_here(f"the peak is at: {owner}")
    if why.optimizer != "adamw":
        return not_here(f"the optimizer ({why.optimizer or 'as given'}) makes no such temporaries")
    fused = next((fix for fix in why.tried if fix.name == "fused-optimizer"), None)
    if fused is None:
        return not_here("a plain torch.optim on the CPU is no foreach")
    figures = {"peak_bytes": fused.before_bytes, "fused_peak_bytes": fused.peak_bytes}
    told = f"peak {format_bytes(fused.before_bytes)} with foreach, {format_bytes(fused.peak_bytes)} fused"
    return (bites if fused.helps else not_here)(told, **figures)


LOGITS_OWN_THE_PEAK = Trap(
    name="logits-own-the-peak",
    sentence="Logits and loss can be larger than all activations, and checkpointing blocks does not touch them.",
    mend="the loss in place (tightfit.plan takes it by itself), a fused loss, or a smaller batch",
    packages=("torch", "transformers"),
    probe=_probe_logits,
    of_run=_logits_run,
    of_peak=_logits_peak,
    asks="a model",
)


FOREACH_TEMPORARIES = Trap(
    name="foreach-temporaries",
    sentence="A foreach optimizer makes temporaries as large as the parameters, often the peak of the whole step.",
    mend="torch.optim.AdamW(..., fused=True); in the Trainer optim: adamw_torch_fused",
    packages=("torch",),
    probe=_probe_foreach,
    of_peak=_foreach_peak,
    asks="a model",
)
