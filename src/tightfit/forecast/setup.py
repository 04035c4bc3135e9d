"""What is asked of a forecast: model, method, batch, length, optimizer, strategy.

Refused: sizes that the model has no positions for (`InvalidInput`).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tightfit.core import (
    InvalidInput,
    Unsupported,
)
from tightfit.core.errors import unknown
from tightfit.step.parallel import Strategy

STRATEGIES = tuple(each.value for each in Strategy)


TRAINERS = ("model", "sft", "dpo")


METHODS = ("full", "lora", "qlora")


OPTIMIZERS = ("adamw", "adamw-fused", "adamw8bit", "paged-adamw8bit", "sgd", "none")


DTYPES = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),  # float32 weights under autocast
    "fp16-mixed": (torch.float32, torch.float16),
}


#: No batch of more tokens is looked at.
MOST_TOKENS = 1 << 24


Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapters:
    """What LoRA puts into a model, beside its rank, in the terms of PEFT's `LoraConfig`."""

    targets: tuple[str, ...] | None = ("all-linear",)  # target_modules; None: PEFT's own choice for the architecture
    parameters: tuple[str, ...] = ()  # target_parameters
    saved: tuple[str, ...] = ()  # modules_to_save: trained whole, on a copy
    dropout: float = 0.0
    dora: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is asked about: a model and how it is trained."""

    model: str
    method: str = "full"
    batch: int = 1  # sequences; with trainer dpo, pairs of them
    seq: int = 2048
    dtype: str = "bf16"
    optimizer: str = "adamw"
    rank: int = 16
    accumulate: bool = False  # gradients of earlier micro-batches are there when a step begins
    world_size: int = 1  # processes, each with a device and a batch of its own
    strategy: str = "one"  # how the step is spread over them
    reshard: bool = True  # FSDP2: are a unit's weights given back between its forward and its backward?
    trainer: str = "model"  # whose loss: the model's own, as transformers' Trainer takes it, or TRL's for SFT or DPO
    settings: tuple[tuple[str, Any], ...] = ()  # of that trainer, as its config names them
    adapters: Adapters = Adapters()  # of the methods that train adapters
    double_quantised: bool = True  # with qlora: are the scales of the 4-bit weights quantised too?
    attention: str | None = None  # attn_implementation; None: transformers' own choice

    @property
    def of_model(self) -> Setup:
        """What the model depends on; the rest is as it is when nothing is said."""
        return Setup(
            model=self.model, method=self.method, dtype=self.dtype, rank=self.rank, adapters=self.adapters,
            double_quantised=self.double_quantised, attention=self.attention,
        )  # fmt: skip

    def checked(self) -> Setup:
        """Itself. Raises `InvalidInput` for what cannot be meant."""
        for what, value, known in (
            ("method", self.method, METHODS), ("optimizer", self.optimizer, OPTIMIZERS), ("dtype", self.dtype, DTYPES),
            ("strategy", self.strategy, STRATEGIES), ("trainer", self.trainer, TRAINERS),
        ):  # fmt: skip
            if value not in known:
                raise unknown(what, value, known)
        if not 1 <= self.world_size <= 1 << 16:
            raise InvalidInput(f"expected a world size from 1 to {1 << 16}, not {self.world_size}")
        if self.world_size > 1 and self.strategy == "one":
            raise InvalidInput(f"{self.world_size} processes were asked for: say how they share the step, ddp or fsdp2")
        if not self.reshard and self.strategy != "fsdp2":
            raise InvalidInput("only FSDP2 gives weights back: --no-reshard goes with --strategy fsdp2")
        if self.method == "qlora" and self.strategy == "fsdp2":
            raise Unsupported("4-bit weights cannot be sharded by FSDP2: use strategy ddp, or method lora")
        if self.trainer == "dpo" and self.strategy == "fsdp2":
            raise Unsupported("how FSDP2 shards DPO's reference is not forecast: use strategy ddp, or one")
        if self.batch < 1:
            raise InvalidInput(f"expected a batch of at least 1 sequence, not {self.batch}")
        if self.seq < 2:
            raise InvalidInput(f"expected a sequence of at least 2 tokens, not {self.seq}")
        if not 1 <= self.rank <= 1 << 16:
            raise InvalidInput(f"expected a LoRA rank from 1 to {1 << 16}, not {self.rank}")
        if self.batch * self.seq > MOST_TOKENS:
            raise InvalidInput(
                f"a batch of {self.batch} x {self.seq} tokens was asked for; more than {MOST_TOKENS} are not looked at"
            )
        return self


def build_model(setup: Setup) -> Any:
    """The model on `meta`, in training mode, with the method's parameters trainable. Setups that differ in the batch
    alone are given the same one."""
    return _built(setup.of_model)


def new_model(setup: Setup) -> Any:
    """As `build_model`, for a caller who changes it."""
    from transformers import AutoModelForCausalLM

    from tightfit.integrations.transformers import config_named

    config = copy.deepcopy(config_named(setup.model))
    weights, compute = DTYPES[setup.dtype]
    attention = {} if setup.attention is None else {"attn_implementation": setup.attention}
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=weights, trust_remote_code=False, **attention)
    except Exception as error:  # model classes raise what they like for configs that do not fit together
        first_line = " ".join(line.strip() for line in str(error).splitlines() if line.strip())[:200]
        raise InvalidInput(
            f"no causal language model can be built from the config of {setup.model!r} "
            f"({type(error).__name__}: {first_line})"
        ) from error
    model.train()
    if setup.method == "qlora":
        from tightfit.integrations.bitsandbytes import quantise

        model = quantise(model, compute or weights, double=setup.double_quantised)
    if setup.method != "full":
        model = with_adapters(model, setup, "meta")
    return model


def with_adapters(model: Any, setup: Setup, device: torch.device | str) -> Any:
    """`model` with the LoRA that the setup asks for, made on `device`."""
    from tightfit.integrations.peft import add_lora

    asked = setup.adapters
    # a name alone may be a pattern, or stand for many
    targets = asked.targets[0] if asked.targets is not None and len(asked.targets) == 1 else asked.targets
    with torch.device(device):
        return add_lora(
            model, rank=setup.rank, dropout=asked.dropout, targets=targets, parameters=asked.parameters,
            saved=asked.saved, dora=asked.dora,
        )  # fmt: skip


_built = functools.lru_cache(maxsize=4)(new_model)


def default_length(name: str) -> int:
    """2,048 tokens, or as many as the model has positions for."""
    from tightfit.integrations.transformers import config_named, positions_of

    positions = positions_of(config_named(name))
    return 2048 if positions is None else min(2048, positions)


def positions_in(model: Any) -> int | None:
    from tightfit.integrations.transformers import positions_of

    return positions_of(model.config)
