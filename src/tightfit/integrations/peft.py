"""LoRA adapters from PEFT.

Invariant: the base model's weights are frozen and unchanged; only the adapters are trainable.
Refused: a missing or broken `peft`, ranks and dropouts out of range, targets that the model does not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tightfit.core import InvalidInput, Unsupported

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["add_lora"]


def add_lora(
    model: Any,
    rank: int = 16,
    alpha: float = 32,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "all-linear",
) -> PeftModel:
    """`model` with LoRA adapters of `rank` on `targets`: `"all-linear"`, or module names as PEFT takes them.

    Raises `Unsupported` when PEFT is not installed and `InvalidInput` for values that PEFT refuses.
    """
    try:
        from peft import LoraConfig, TaskType, get_peft_model
    except ImportError as error:
        raise Unsupported(f"LoRA needs the package peft ({error}): pip install 'tightfit[peft]'") from None
    if rank < 1:
        raise InvalidInput(f"expected a LoRA rank of at least 1, not {rank}")
    if not 0 <= dropout < 1:
        raise InvalidInput(f"expected a LoRA dropout of at least 0 and below 1, not {dropout}")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT says int and divides it by the rank
        lora_dropout=dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type=TaskType.CAUSAL_LM,
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise InvalidInput(f"PEFT cannot put LoRA on {targets!r} of this model: {first_line}") from error
    adapted.train()
    return adapted
