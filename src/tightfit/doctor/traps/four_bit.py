"""4-bit weights that an evaluation on the CPU has repacked."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tightfit.accelerator import is_host
from tightfit.doctor.run import Run, is_true
from tightfit.doctor.traps.trap import (
    Seen,
    Trap,
    bites,
    cannot_tell,
    error_between,
    gradients_of,
    not_here,
    tiny_batch,
    tiny_model,
    with_lora,
)
from tightfit.forecast import Setup


def _probe_4bit() -> Seen:
    from bitsandbytes.nn.modules import has_avx512bf16

    from tightfit.integrations.bitsandbytes import quantise

    if not has_avx512bf16():
        return not_here("bitsandbytes repacks 4-bit weights on CPUs with AVX512-BF16 only, and this one has none")

    def model() -> Any:
        adapted = with_lora(quantise(tiny_model(hidden_size=64), torch.float32))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # zero at the start, which would hide the base layers' part
                nn.init.normal_(parameter, std=0.1)
        return adapted

    def after_evaluation(adapted: Any) -> list[torch.Tensor | None]:
        adapted.eval()
        with torch.no_grad():
            adapted(tiny_batch()["input_ids"])
        adapted.train()
        return gradients_of(adapted)

    expected = gradients_of(model())
    repeated = error_between(gradients_of(model()), expected)
    error = error_between(after_evaluation(model()), expected)
    mended = error_between(after_evaluation(_unpacked(model())), expected)
    figures = {"relative_error": error, "relative_error_repeated": repeated, "relative_error_mended": mended}
    told = (
        f"QLoRA on the CPU: after one eval() forward the gradients are off by {error:.2g} of their norm, without an "
        f"error (a repeated step: {repeated:.2g}; with the repacking off: {mended:.2g})"
    )
    return (bites if error > 1e-3 else not_here)(told, **figures)


def _unpacked(model: Any) -> Any:
    """The mend of the trap: layers that are told that the CPU cannot repack do not."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _4bit_run(run: Run) -> Seen | None:
    if run.trainer == "accelerate":
        return None
    if not is_true(run.get("load_in_4bit")):
        return not_here("the run loads no 4-bit weights")
    if not run.on_cpu:
        return not_here("the run is on a GPU, where 4-bit weights are not repacked")
    strategy = run.get("eval_strategy")
    if str(getattr(strategy, "value", strategy)) in ("no", "False", "None") and not is_true(run.get("eval_on_start")):
        return not_here("the run does not evaluate in the middle of training (eval_strategy: no)")
    return bites("the run trains 4-bit weights on the CPU and evaluates in between")


def _4bit_setup(setup: Setup) -> Seen | None:
    if setup.method != "qlora":
        return not_here("no weights are in 4 bits")
    return cannot_tell("weights are in 4 bits: it bites on a CPU with AVX512-BF16 that evaluates in between")


def _4bit_model(model: nn.Module) -> Seen | None:
    layers: list[Any] = [m for m in model.modules() if type(m).__name__ in ("Linear4bit", "LinearNF4", "LinearFP4")]
    if not layers:
        return not_here("the model has no 4-bit layers")
    packed = sum(bool(getattr(getattr(m.weight, "quant_state", None), "packing_format_for_cpu", False)) for m in layers)
    if packed:
        return bites(f"{packed} of {len(layers)} 4-bit layers are repacked for inference: no gradient passes them")
    ready = sum(bool(getattr(m, "support_avx512bf16_for_cpu", False)) and is_host(m.weight.device) for m in layers)
    if ready:
        return cannot_tell(f"{ready} of {len(layers)} 4-bit layers will be repacked by the first eval() forward")
    return not_here("the 4-bit layers are on a GPU, or their repacking is off")


FOUR_BIT_CPU_AFTER_EVAL = Trap(
    name="4bit-cpu-after-eval",
    sentence="The first eval() forward repacks 4-bit weights for CPU inference, and no gradient passes them after.",
    mend="for m in model.modules(): m.support_avx512bf16_for_cpu = False, before the first evaluation",
    packages=("torch", "bitsandbytes", "peft"),
    probe=_probe_4bit,
    of_run=_4bit_run,
    of_setup=_4bit_setup,
    of_model=_4bit_model,
)
