"""Random numbers that differ between forward and replay: the FSDP2 helper, the compiler's budget."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from tightfit.doctor.run import Run, is_true
from tightfit.doctor.traps.trap import (
    Seen,
    Trap,
    bites,
    cannot_tell,
    checkpoint_wrapped,
    config_of,
    dropouts_of,
    error_between,
    gradients_of,
    not_here,
    switched_on,
    tiny_model,
)
from tightfit.forecast import Setup
from tightfit.step.patches import compiled_entries


def _probe_fsdp2_random_state() -> Seen:
    from accelerate.utils.fsdp_utils import fsdp2_apply_ac

    def model(dropout: float) -> Any:
        return tiny_model("gpt2", resid_pdrop=dropout)

    def wrapped(dropout: float) -> Any:
        made = model(dropout)
        plugin = SimpleNamespace(
            auto_wrap_policy=None, activation_checkpointing_offload=False, transformer_cls_names_to_wrap=["GPT2Block"]
        )
        from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

        plugin.auto_wrap_policy = functools.partial(
            transformer_auto_wrap_policy, transformer_layer_cls={type(made.transformer.h[0])}
        )
        accelerator: Any = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
        return fsdp2_apply_ac(accelerator, made)

    made = wrapped(0.1)
    if not checkpoint_wrapped(made):
        return cannot_tell("accelerate's fsdp2_apply_ac wrapped no block of the probe's model")
    error = error_between(gradients_of(made), gradients_of(model(0.1)))
    quiet = error_between(gradients_of(wrapped(0.0)), gradients_of(model(0.0)))
    mended = error_between(gradients_of(_preserving(wrapped(0.1))), gradients_of(model(0.1)))
    figures = {"relative_error": error, "relative_error_without_dropout": quiet, "relative_error_mended": mended}
    told = (
        f"GPT-2 blocks with dropout 0.1 under accelerate's fsdp2_apply_ac: gradients off by {error:.2g} of their norm, "
        f"without an error; {quiet:.2g} without dropout, {mended:.2g} with the state preserved"
    )
    return (bites if error > 1e-3 else not_here)(told, **figures)


def _preserving(model: Any) -> Any:
    """The mend of the trap: every checkpoint wrapper keeps the random state."""
    for _, wrapper in checkpoint_wrapped(model):
        wrapper.checkpoint_fn.keywords["preserve_rng_state"] = True
    return model


def _draws_random_numbers(run: Run) -> Seen | str:
    """Which dropout the run's blocks have, or why that is not known."""
    if is_true(run.get("use_peft")) and float(run.get("lora_dropout") or 0) > 0:
        return f"lora_dropout {run.get('lora_dropout')}"
    name = run.values.get("model_name_or_path")
    if name is None:
        return cannot_tell("the random state is not preserved, but the run names no model, so its dropout is unknown")
    found = dropouts_of(config_of(str(name)))
    return found or not_here("the blocks draw no random numbers: every dropout of the config is 0")


def _random_state_run(run: Run) -> Seen | None:
    fsdp = run.fsdp
    unpreserved = run.checkpointing and run.checkpoint_kwargs.get("preserve_rng_state") is False
    version = str(fsdp.get("version", fsdp.get("fsdp_version", 1)))
    helper = is_true(fsdp.get("activation_checkpointing")) and version == "2"
    if not unpreserved and not helper:
        how = "FSDP's own activation checkpointing is off or its version is 1" if fsdp else "the run uses no FSDP"
        return not_here(f"{how}, and preserve_rng_state is not switched off")
    drawn = _draws_random_numbers(run)
    if isinstance(drawn, Seen):
        return drawn
    return bites(f"{'FSDP2 checkpoints' if helper else 'preserve_rng_state: false'}, and the blocks draw ({drawn})")


def _random_state_setup(setup: Setup) -> Seen | None:
    drawn = dropouts_of(config_of(setup.model))
    if drawn:
        return cannot_tell(f"the blocks draw random numbers ({drawn}): it bites under FSDP2's own checkpointing")
    return not_here("the blocks draw no random numbers: every dropout of the config is 0 (adapters may have one)")


def _random_state_model(model: nn.Module) -> Seen | None:
    functions = [(path, wrapper.checkpoint_fn) for path, wrapper in checkpoint_wrapped(model)] + switched_on(model)
    paths = [
        path for path, function in functions
        if isinstance(function, functools.partial) and function.keywords.get("preserve_rng_state") is False
    ]  # fmt: skip
    if not paths:
        return not_here("no module is checkpointed without its random state")
    drops = [
        name for path in paths for name, module in model.get_submodule(path).named_modules()
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
    ]  # fmt: skip
    config = getattr(model, "config", None)
    if drops or (config is not None and dropouts_of(config)):
        return bites(f"{len(paths)} modules with dropout are checkpointed with preserve_rng_state=False")
    return not_here("modules are checkpointed with preserve_rng_state=False, but none of them has a dropout")


def _compiled_errors(backend: str) -> dict[str, float]:
    """Relative gradient error of a compiled block with dropout, by budget, against the eager one."""
    import torch._functorch.config as functorch_config
    import torch._inductor.config as inductor_config

    generator = torch.Generator().manual_seed(0)
    weights = [(torch.randn(64, 64, generator=generator) / 8).requires_grad_() for _ in range(4)]
    x = torch.randn(32, 64, generator=generator).requires_grad_()

    def block(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        for weight in weights:
            x = nn.functional.dropout(nn.functional.gelu(x @ weight), 0.5)
        return x

    def gradients(function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        torch.manual_seed(3)
        return list(torch.autograd.grad(function(x, *weights).square().sum(), [x, *weights]))

    expected = gradients(block)
    errors = {}
    for budget in (1.0, 0.5):
        torch._dynamo.reset()
        # eager's random numbers, so that the gradients can be compared
        with functorch_config.patch(activation_memory_budget=budget), inductor_config.patch(fallback_random=True):
            errors[str(budget)] = error_between(gradients(torch.compile(block, backend=backend)), expected)
    torch._dynamo.reset()
    return errors


def _probe_compiler(backend: str) -> Seen:
    errors = _compiled_errors(backend)
    told = (
        f"torch.compile ({backend}) of four layers with dropout: gradients off by {errors['0.5']:.2g} of their norm at "
        f"activation_memory_budget 0.5, by {errors['1.0']:.2g} at 1.0"
    )
    figures = {"backend": backend, "relative_error_by_budget": errors}
    if errors["1.0"] > 1e-3:
        return cannot_tell(f"{told}: already wrong without a budget, so the comparison says nothing", **figures)
    return (bites if errors["0.5"] > 1e-3 else not_here)(told, **figures)


def _compiler_budget() -> float:
    import torch._functorch.config as functorch_config

    return float(functorch_config.activation_memory_budget)


def _compiler_run(run: Run) -> Seen | None:
    if run.trainer == "accelerate":
        return None
    if not is_true(run.get("torch_compile")):
        return not_here("the run does not compile (torch_compile)")
    return cannot_tell("the run compiles, but the budget is set in code (torch._functorch.config), not in the YAML")


def _compiler_setup(setup: Setup) -> Seen | None:
    drawn = dropouts_of(config_of(setup.model))
    if drawn:
        return cannot_tell(f"the blocks draw random numbers ({drawn}): it bites when they are compiled with a budget")
    return not_here("the blocks draw no random numbers: every dropout of the config is 0 (adapters may have one)")


def _compiler_model(model: nn.Module) -> Seen | None:
    if not compiled_entries(model):
        return not_here("no module is compiled")
    budget = _compiler_budget()
    if budget >= 1:
        return not_here("the model is compiled, but activation_memory_budget is 1")
    drops = any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules())
    if drops:
        return bites(f"the model is compiled with dropout, and activation_memory_budget is {budget}")
    return not_here(f"activation_memory_budget is {budget}, but the model has no dropout")


RANDOM_STATE_NOT_PRESERVED = Trap(
    name="random-state-not-preserved",
    sentence="An FSDP2 helper checkpoints without the random state, so dropout draws another mask when it reruns.",
    mend="fsdp_activation_checkpointing: false, and checkpoint with preserve_rng_state=True before sharding",
    packages=("torch", "accelerate"),
    probe=_probe_fsdp2_random_state,
    of_run=_random_state_run,
    of_setup=_random_state_setup,
    of_model=_random_state_model,
)


COMPILER_BUDGET_WITH_DROPOUT = Trap(
    name="compiler-budget-with-dropout",
    sentence="torch.compile with an activation_memory_budget below 1 reruns dropout with another mask.",
    mend="leave torch._functorch.config.activation_memory_budget at 1, or set every dropout to 0",
    packages=("torch",),
    probe=functools.partial(_probe_compiler, "aot_eager_decomp_partition"),
    deep=functools.partial(_probe_compiler, "inductor"),
    of_run=_compiler_run,
    of_setup=_compiler_setup,
    of_model=_compiler_model,
)
