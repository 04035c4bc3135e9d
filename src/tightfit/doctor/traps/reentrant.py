"""Reentrant checkpointing: the default that an empty dict of arguments selects, and the gradients that it loses."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from torch import nn

from tightfit.core import format_bytes
from tightfit.doctor.run import Run
from tightfit.doctor.traps.trap import (
    Seen,
    Trap,
    Verdict,
    bites,
    cannot_tell,
    checkpoint_by_hand,
    checkpoint_wrapped,
    gradients_of,
    is_reentrant,
    not_here,
    peak_of,
    switched_on,
    tiny_batch,
    tiny_model,
    with_lora,
)
from tightfit.forecast import Setup
from tightfit.step.modules import find_units


def _node_with(arguments: Any) -> str:
    model = tiny_model()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(arguments)
    seen: list[str] = []
    hook = model.model.layers[0].register_forward_hook(
        lambda module, given, out: seen.append(type((out[0] if isinstance(out, tuple) else out).grad_fn).__name__)
    )
    model(**tiny_batch(), use_cache=False)
    hook.remove()
    return seen[0]


def _probe_reentrant() -> Seen:
    nodes = {name: _node_with(given) for name, given in (("None", None), ("{}", {}))}
    reentrant = {name: node.startswith("CheckpointFunction") for name, node in nodes.items()}
    peft = None
    if importlib.util.find_spec("peft") is not None:
        from peft import prepare_model_for_kbit_training

        model = tiny_model()
        model.is_loaded_in_4bit = True  # what it asks before it switches checkpointing on
        functions = [function for _, function in switched_on(prepare_model_for_kbit_training(model))]
        peft = any(is_reentrant(function) for function in functions)
    figures = {"nodes": nodes, "peft_prepare_for_kbit_is_reentrant": peft}
    told = "; peft's prepare_model_for_kbit_training leaves it reentrant too" if peft else ""
    if not any(reentrant.values()):
        return (bites if peft else not_here)(f"{{}} and nothing both give the non-reentrant way{told}", **figures)
    way = " and ".join(name for name, found in reentrant.items() if found)
    return bites(
        f"activation_checkpointing_enable({way}) makes a {nodes['{}']} node, where None makes a {nodes['None']}{told}",
        **figures,
    )


def _reentrant_run(run: Run) -> Seen | None:
    if run.trainer == "accelerate":
        return None
    if not run.checkpointing:
        return not_here("the run has activation checkpointing off")
    said = dict(run.checkpoint_kwargs)
    if said.get("use_reentrant"):
        return bites("the run asks for use_reentrant: true")
    rest = [key for key in said if key not in ("every_n_layers", "offload", "selective")]
    if "use_reentrant" in said or not rest:
        return not_here("the Trainer turns an empty or missing dict of arguments into use_reentrant=False")
    return bites(
        f"its checkpointing arguments ({', '.join(rest)}) leave out use_reentrant, so torch's own default holds"
    )


def _reentrant_model(model: nn.Module) -> Seen | None:
    paths = [path for path, function in switched_on(model) if is_reentrant(function)]
    paths += [
        path for path, wrapper in checkpoint_wrapped(model)
        if "REENTRANT" in str(getattr(wrapper, "checkpoint_impl", "")) and "NO_" not in str(wrapper.checkpoint_impl)
    ]  # fmt: skip
    if paths:
        return bites(f"{len(paths)} modules are checkpointed the reentrant way, the first is {paths[0] or 'the model'}")
    return not_here("no module is checkpointed the reentrant way")


def _missing(make: Callable[[], Any]) -> tuple[int, int]:
    """(trainable parameters without a gradient, all of them); a loss that needs no gradient leaves all without."""
    model = make()
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        return sum(gradient is None for gradient in gradients_of(model)), len(trainable)
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        return len(trainable), len(trainable)


def _probe_missing_input_gradients() -> Seen:
    def by_switch() -> Any:
        model = with_lora(tiny_model())
        base = model.get_base_model()
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": True})
        return model

    def by_hand(reentrant: bool) -> Any:
        model = tiny_model()
        adapted = with_lora(model)
        checkpoint_by_hand(model, reentrant)
        return adapted

    (switch, count), (hand, _), (other, _) = (
        _missing(make) for make in (by_switch, lambda: by_hand(True), lambda: by_hand(False))
    )
    figures = {
        "parameters": count,
        "missing_by_switch": switch,
        "missing_by_hand": hand,
        "missing_non_reentrant": other,
    }
    told = (
        f"a LoRA model checkpointed the reentrant way by hand: {hand} of {count} trainable parameters get no gradient"
    )
    switched = (
        f"transformers' own switch makes the inputs require gradients itself ({switch} missing)"
        if not switch
        else f"so do {switch} with transformers' own switch"
    )
    if hand or switch or other:
        return bites(f"{told}; {switched}; the non-reentrant way: {other} missing", **figures)
    return not_here(f"every gradient is there; {switched}", **figures)


def _missing_input_gradients_run(run: Run) -> Seen | None:
    if run.trainer == "accelerate":
        return None
    return not_here("transformers' switch, which the Trainer uses, makes the inputs require gradients")


def _missing_input_gradients_setup(setup: Setup) -> Seen | None:
    if setup.method == "full":
        return not_here("the embeddings are trained, so their output requires gradients")
    return cannot_tell("the embeddings are frozen: it bites a loop that checkpoints the reentrant way by hand")


def _missing_input_gradients_model(model: nn.Module) -> Seen | None:
    reentrant = _reentrant_model(model)
    if reentrant is None or reentrant.verdict is not Verdict.BITES:
        return not_here("no module is checkpointed the reentrant way")
    find = getattr(model, "get_input_embeddings", None)
    embeddings = find() if callable(find) else None
    if embeddings is None:
        return cannot_tell("the model has no input embeddings that could be asked")
    if any(p.requires_grad for p in embeddings.parameters()) or embeddings._forward_hooks:
        return not_here("the input embeddings are trainable, or a hook makes their output require gradients")
    return bites("checkpointing is reentrant, and the frozen embeddings' output requires no gradient")


def _probe_stale_hook() -> Seen:
    model = tiny_model(layers=4)
    for layer in model.model.layers[:3]:
        layer.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(False)
    peak_of(model, tiny_batch(), use_cache=False)
    before = peak_of(model, tiny_batch(), use_cache=False)
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()
    after = peak_of(model, tiny_batch(), use_cache=False)
    model.disable_input_require_grads()
    mended = peak_of(model, tiny_batch(), use_cache=False)
    figures = {"peak_bytes_before": before, "peak_bytes_after": after, "peak_bytes_mended": mended}
    told = (
        f"checkpointing switched on and off again: the peak of a step with 3 of 4 layers frozen went from "
        f"{format_bytes(before)} to {format_bytes(after)}"
    )
    if after > before * 1.01:
        return bites(f"{told}; with the hook removed it is {format_bytes(mended)}", **figures)
    return not_here(told, **figures)


def _stale_hook_run(run: Run) -> Seen | None:
    if run.trainer == "accelerate":
        return None
    if not run.checkpointing:
        return not_here("the run has activation checkpointing off")
    return not_here("the first block has adapters or is trained, so there is no frozen prefix to keep")


def _stale_hook_setup(setup: Setup) -> Seen | None:
    return not_here("the first block has adapters or is trained, so there is no frozen prefix to keep")


def _stale_hook_model(model: nn.Module) -> Seen | None:
    find = getattr(model, "get_input_embeddings", None)
    embeddings = find() if callable(find) else None
    if embeddings is None or any(p.requires_grad for p in embeddings.parameters()):
        return not_here("the input embeddings are trained, or there are none")
    hooks = [getattr(hook, "__name__", "") for hook in embeddings._forward_hooks.values()]
    if "make_inputs_require_grads" not in hooks:
        return not_here("no hook makes the frozen embeddings' output require gradients")
    reentrant = _reentrant_model(model)
    if reentrant is not None and reentrant.verdict is Verdict.BITES:
        return not_here("the hook is needed: checkpointing is reentrant")
    units = find_units(model)
    frozen = 0
    for unit in units.values():
        if any(p.requires_grad for p in unit.parameters()):
            break
        frozen += 1
    if frozen:
        return bites(f"{frozen} of {len(units)} units come before the first trainable one, and are kept for its hook")
    return not_here("the first unit is trained, so there is no frozen prefix to keep")


REENTRANT_BY_DEFAULT = Trap(
    name="reentrant-by-default",
    sentence="An empty dict of checkpointing arguments is not the same as none: it selects torch's reentrant way.",
    mend='pass {"use_reentrant": False}, also to peft\'s prepare_model_for_kbit_training',
    packages=("torch", "transformers", "peft"),
    probe=_probe_reentrant,
    of_run=_reentrant_run,
    of_model=_reentrant_model,
)


MISSING_INPUT_GRADIENTS = Trap(
    name="missing-input-gradients",
    sentence="Reentrant checkpointing gives no gradients in a region none of whose inputs needs one, as in LoRA.",
    mend="use_reentrant=False, or model.enable_input_require_grads() before training",
    packages=("torch", "transformers", "peft"),
    probe=_probe_missing_input_gradients,
    of_run=_missing_input_gradients_run,
    of_setup=_missing_input_gradients_setup,
    of_model=_missing_input_gradients_model,
)


INPUT_GRADIENT_HOOK_LEFT = Trap(
    name="input-gradient-hook-left",
    sentence="The hook that makes the inputs require gradients stays on, and a frozen prefix is kept for nobody.",
    mend="model.disable_input_require_grads() after switching checkpointing off, or with use_reentrant=False",
    packages=("torch", "transformers"),
    probe=_probe_stale_hook,
    of_run=_stale_hook_run,
    of_setup=_stale_hook_setup,
    of_model=_stale_hook_model,
)
