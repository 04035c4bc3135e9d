"""What a trap is, and the tiny models and measures that probes share.

A probe does the thing on a tiny model and looks at the outcome: a gradient, a peak by the allocator's count, an
autograd node. It knows no version numbers.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tightfit.accelerator import HOST
from tightfit.doctor.peak import Why
from tightfit.doctor.run import Run
from tightfit.forecast import Setup
from tightfit.verify.peak import PeakMeter


class Verdict(enum.Enum):
    BITES = "bites"
    NOT_HERE = "not here"
    CANNOT_TELL = "cannot tell"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What was found, in one sentence, and its figures (bytes, relative errors, counts)."""

    verdict: Verdict
    why: str
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trap:
    name: str
    sentence: str
    mend: str
    packages: tuple[str, ...]
    probe: Callable[[], Seen]
    of_run: Callable[[Run], Seen | None] = lambda _: None
    of_model: Callable[[nn.Module], Seen | None] = lambda _: None
    of_setup: Callable[[Setup], Seen | None] = lambda _: None  # of a step whose run is not known
    of_peak: Callable[[Why], Seen | None] = lambda _: None
    asks: str = "the run's YAML"  # what would have to be given to tell
    deep: Callable[[], Seen] | None = None  # a slower probe, in place of `probe`


def bites(why: str, **figures: Any) -> Seen:
    return Seen(verdict=Verdict.BITES, why=why, figures=figures)


def not_here(why: str, **figures: Any) -> Seen:
    return Seen(verdict=Verdict.NOT_HERE, why=why, figures=figures)


def cannot_tell(why: str, **figures: Any) -> Seen:
    return Seen(verdict=Verdict.CANNOT_TELL, why=why, figures=figures)


def tiny_model(kind: str = "llama", *, layers: int = 2, **changed: Any) -> Any:
    """A model of a few thousand parameters in training mode, always the same one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shapes: dict[str, dict[str, Any]] = {
        "gpt2": {
            "vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": layers, "n_head": 2,
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        },
        "llama": {
            "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers,
            "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
        },
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**shapes[kind], **changed})
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()


def tiny_batch(batch: int = 1, seq: int = 32) -> dict[str, torch.Tensor]:
    ids = (torch.arange(batch * seq) * 7 % 61).view(batch, seq)
    return {"input_ids": ids, "labels": ids}


def gradients_of(model: nn.Module, **said: Any) -> list[torch.Tensor | None]:
    """Of the trainable parameters in order, after one step from the same random state."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    model(**tiny_batch(), use_cache=False, **said).loss.backward()
    return [p.grad for p in model.parameters() if p.requires_grad]


def error_between(found: Iterable[torch.Tensor | None], expected: Iterable[torch.Tensor | None]) -> float:
    """Norm of the difference over the norm of what was expected; a missing gradient counts as zero."""
    pairs = [(f, e) for f, e in zip(found, expected, strict=True) if e is not None]
    off = sum(float((e if f is None else f - e).double().square().sum()) for f, e in pairs)
    return float((off / sum(float(e.double().square().sum()) for _, e in pairs)) ** 0.5)


def peak_of(model: nn.Module, batch: Mapping[str, torch.Tensor], **said: Any) -> int:
    """What forward and backward add at most, by the allocator's count."""
    model.zero_grad(set_to_none=True)
    with PeakMeter(HOST) as meter:
        model(**batch, **said).loss.backward()
    return meter.rise_bytes


# Each trap: its probe, then what it sees in a run, a model, or the peak of a step.


def is_reentrant(function: Any) -> bool | None:
    """Does this checkpoint function, bound as transformers does, go the reentrant way? `None`: it is another one."""
    if not isinstance(function, functools.partial):
        return None
    found = function.keywords.get("use_reentrant")
    return True if found is None else bool(found)


def switched_on(model: nn.Module) -> list[tuple[str, Any]]:
    """(path, checkpoint function) of the modules that transformers' switch has on; not those that only hold others."""

    def has_flag(module: nn.Module) -> bool:
        return isinstance(getattr(module, "gradient_checkpointing", None), bool)

    return [
        (path, getattr(module, "_gradient_checkpointing_func", None))
        for path, module in model.named_modules()
        if has_flag(module)
        and module.gradient_checkpointing is True
        and not any(has_flag(inner) for inner in module.modules() if inner is not module)
    ]


def checkpoint_wrapped(model: nn.Module) -> list[tuple[str, Any]]:
    """(path, wrapper) of torch's checkpoint wrappers, which FSDP's helpers put on."""
    return [(path, module) for path, module in model.named_modules() if type(module).__name__ == "CheckpointWrapper"]


def with_lora(model: Any) -> Any:
    from tightfit.integrations.peft import add_lora

    return add_lora(model, rank=2)


def checkpoint_by_hand(model: Any, reentrant: bool) -> None:
    for layer in model.model.layers:
        forward = layer.forward

        def run(*args: Any, _forward: Any = forward, **kwargs: Any) -> Any:
            return checkpoint(functools.partial(_forward, **kwargs), *args, use_reentrant=reentrant)

        layer.forward = run


def config_of(name: str) -> Any:
    from tightfit.integrations.transformers import config_named

    config = config_named(name)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def dropouts_of(config: Any) -> str:
    said = vars(config)
    found = [
        f"{key} {value}" for key, value in said.items()
        if ("dropout" in key or key.endswith("_pdrop")) and isinstance(value, float) and value > 0
        and not key.startswith(("embd", "embed", "classifier", "summary"))
    ]  # fmt: skip
    return ", ".join(found)
