"""A generation cache in training."""

from __future__ import annotations

import contextlib
import functools

from torch import nn

from tightfit.core import format_bytes
from tightfit.doctor.run import Run, is_true
from tightfit.doctor.traps.trap import (
    Seen,
    Trap,
    bites,
    cannot_tell,
    config_of,
    not_here,
    peak_of,
    switched_on,
    tiny_batch,
    tiny_model,
)
from tightfit.forecast import Setup
from tightfit.step.modules import find_units
from tightfit.verify.measure import every_block_checkpointed


def _probe_use_cache() -> Seen:
    batch = tiny_batch(2, 64)
    peaks = {}
    for kind in ("gpt2", "llama"):
        model = tiny_model(kind, layers=4)
        peak_of(model, batch, use_cache=True)
        for name, context in (
            ("plain", contextlib.nullcontext),
            ("checkpointed", functools.partial(every_block_checkpointed, model)),
        ):
            with context():
                for cache in (True, False):
                    peaks[f"{kind}_{name}_{'cache' if cache else 'no_cache'}_bytes"] = peak_of(
                        model, batch, use_cache=cache
                    )
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
        peaks[f"{kind}_switch_cache_bytes"] = peak_of(model, batch, use_cache=True)
    pairs = {
        f"{kind}, {said}": (peaks[f"{kind}_{name}_cache_bytes"], peaks[f"{kind}_{name}_no_cache_bytes"])
        for kind in ("gpt2", "llama")
        for name, said in (("checkpointed", "torch.utils.checkpoint around every block"), ("plain", "no checkpointing"))
    }
    worst = max(pairs, key=lambda name: pairs[name][0] / pairs[name][1])
    with_cache, without = pairs[worst]
    told = f"{worst}: {format_bytes(with_cache)} with the cache, {format_bytes(without)} without"
    switch = all(
        peaks[f"{k}_switch_cache_bytes"] <= peaks[f"{k}_checkpointed_no_cache_bytes"] * 1.01 for k in ("gpt2", "llama")
    )
    told += "; transformers' own switch drops the cache itself" if switch else "; so does transformers' own switch"
    return (bites if with_cache > without * 1.01 else not_here)(told, **peaks)


def _use_cache_run(run: Run) -> Seen | None:
    if run.trainer == "accelerate":
        return None
    if is_true(run.get("use_cache")) and not run.checkpointing:
        return bites("the run says use_cache: true and does not checkpoint")
    return not_here("the Trainer sets config.use_cache from its own argument, which is off here, or drops the cache")


def _use_cache_setup(setup: Setup) -> Seen | None:
    if not getattr(config_of(setup.model), "use_cache", False):
        return not_here("config.use_cache is off")
    return cannot_tell("config.use_cache is on: the Trainer switches it off, a loop of your own has to")


def _use_cache_model(model: nn.Module) -> Seen | None:
    config = getattr(model, "config", None)
    if not getattr(config, "use_cache", False):
        return not_here("config.use_cache is off")
    on = switched_on(model)
    if on and len(on) >= len(find_units(model)):
        return not_here("config.use_cache is on, but transformers' checkpointing drops the cache in every layer")
    return bites("config.use_cache is on: a call of the model in training keeps every layer's keys and values")


USE_CACHE = Trap(
    name="use-cache",
    sentence="A generation cache in training keeps every layer's keys and values, whatever checkpointing drops.",
    mend="model.config.use_cache = False for training",
    packages=("torch", "transformers"),
    probe=_probe_use_cache,
    of_run=_use_cache_run,
    of_setup=_use_cache_setup,
    of_model=_use_cache_model,
)
