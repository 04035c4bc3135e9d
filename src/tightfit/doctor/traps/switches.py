"""Switches that do another thing than they say: TRL's, and transformers' in eval mode."""

from __future__ import annotations

import functools
import tempfile

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tightfit.core import format_bytes
from tightfit.doctor.run import Run, is_true
from tightfit.doctor.traps.trap import Seen, Trap, bites, not_here, switched_on, tiny_batch, tiny_model
from tightfit.step.saved import without_history


def _probe_trl() -> Seen:
    from trl import SFTConfig
    from trl.models.utils import disable_gradient_checkpointing

    with tempfile.TemporaryDirectory() as folder:
        # what the trainer really gets, not what the class says
        arguments = SFTConfig(output_dir=folder, use_cpu=True, bf16=False, report_to="none")
    by_default = bool(getattr(arguments, "activation_checkpointing", None) or arguments.gradient_checkpointing)
    model = tiny_model(layers=4)
    asked = [True, False, True, False]
    for layer, on in zip(model.model.layers, asked, strict=True):
        layer.gradient_checkpointing = on
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
    with disable_gradient_checkpointing(model):
        pass
    left = [bool(layer.gradient_checkpointing) for layer in model.model.layers]
    breaks = ""
    with disable_gradient_checkpointing(model, {"every_n_layers": 2}):
        pass
    try:
        model(**tiny_batch(), use_cache=False)
    except (TypeError, ValueError) as error:
        breaks = str(error).splitlines()[0]
    figures = {
        "on_by_default": by_default,
        "layers_asked": asked,
        "layers_after": left,
        "every_n_layers": breaks or "ok",
    }
    told = []
    if by_default:
        told.append("SFTConfig() turns checkpointing on")
    if left != asked:
        told.append(
            f"after the reference forward of its preference trainers {sum(left)} of {len(left)} layers are "
            f"checkpointed, where {sum(asked)} were asked for"
        )
    if breaks:
        told.append(f"every_n_layers ends the next step there ({breaks})")
    if told:
        return bites("; ".join(told), **figures)
    return not_here("TRL leaves checkpointing as it was asked for", **figures)


def _trl_run(run: Run) -> Seen | None:
    if run.trainer == "transformers":
        return not_here("the run is not TRL's")
    if run.trainer == "accelerate":
        return None
    restores = run.trainer == "dpo" and run.checkpointing and not is_true(run.get("precompute_ref_log_probs"))
    if restores and "every_n_layers" in run.checkpoint_kwargs:
        return bites("every_n_layers does not survive the reference's forward, which every step has")
    if run.asked_for_checkpointing is None and run.checkpointing:
        said = f"the run says nothing about checkpointing, so TRL's default for {run.trainer} checkpoints every block"
        return bites(said)
    return not_here(f"the run says itself that checkpointing is {'on' if run.checkpointing else 'off'}")


def _saved_bytes(model: nn.Module) -> int:
    """What autograd keeps of one forward, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return without_history(tensor)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(**tiny_batch(), use_cache=False)
    del out
    return sum(kept.values())


def _probe_off_in_eval() -> Seen:
    model = tiny_model("gpt2", layers=4)
    plain = _saved_bytes(model)
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    training = _saved_bytes(model.train())
    evaluating = _saved_bytes(model.eval())
    active = getattr(model, "is_activation_checkpointing", None) or getattr(model, "is_gradient_checkpointing", None)
    figures = {"saved_bytes_off": plain, "saved_bytes_train": training, "saved_bytes_eval": evaluating}
    told = (
        f"checkpointing on: autograd keeps {format_bytes(training)} in train() and {format_bytes(evaluating)} in "
        f"eval() ({format_bytes(plain)} without checkpointing); is_activation_checkpointing says {bool(active)} in both"
    )
    return (bites if evaluating > (training + plain) / 2 else not_here)(told, **figures)


def _off_in_eval_run(run: Run) -> Seen | None:
    if run.trainer == "accelerate":
        return None
    return not_here("the Trainer calls model.train() before every step")


def _off_in_eval_model(model: nn.Module) -> Seen | None:
    on = [path for path, _ in switched_on(model)]
    off = [path for path in on if not model.get_submodule(path).training]
    if off:
        return bites(f"{len(off)} of {len(on)} modules with checkpointing on are in eval mode, where it does nothing")
    return not_here(f"{len(on)} modules have checkpointing on, all in train mode" if on else "checkpointing is off")


TRL_OVERRIDES_THE_PLAN = Trap(
    name="trl-overrides-the-plan",
    sentence="TRL checkpoints every block unless told not to, and again every block after a reference's forward.",
    mend="gradient_checkpointing: false in the run; tightfit decides what to recompute",
    packages=("torch", "transformers", "trl"),
    probe=_probe_trl,
    of_run=_trl_run,
)


OFF_IN_EVAL = Trap(
    name="off-in-eval",
    sentence="transformers' checkpointing does nothing in modules in eval mode, without a word.",
    mend="model.train() before the step; to switch dropout off set its p to 0 instead of calling eval()",
    packages=("torch", "transformers"),
    probe=_probe_off_in_eval,
    of_run=_off_in_eval_run,
    of_model=_off_in_eval_model,
    asks="the run's YAML, or the live model to tightfit.doctor.examine",
)
