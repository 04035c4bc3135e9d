"""LoRA adapters from PEFT, on whole and on quantised models.

Invariant: the base model's weights are frozen and unchanged; only the adapters are trainable.
Refused: a missing or broken `peft`, ranks and dropouts out of range, targets that the model does not have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tightfit.core import InvalidInput, Unsupported

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["add_lora", "no_input_gradients", "prepare_for_kbit_training"]


def add_lora(
    model: Any,
    rank: int = 16,
    alpha: float = 32,
    dropout: float = 0.0,
    targets: str | Sequence[str] | None = "all-linear",
    *,
    parameters: Sequence[str] = (),
    saved: Sequence[str] = (),
    dora: bool = False,
) -> PeftModel:
    """`model` with LoRA adapters of `rank` on `targets`: `"all-linear"`, module names as PEFT takes them, or `None` for
    PEFT's own choice for the architecture.

    `parameters`, `saved` and `dora` are PEFT's `target_parameters`, `modules_to_save` and `use_dora`.

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
        target_modules=targets if targets is None or isinstance(targets, str) else list(targets),
        modules_to_save=list(saved) or None,
        use_dora=dora,
        task_type=TaskType.CAUSAL_LM,
        **({"target_parameters": list(parameters)} if parameters else {}),  # PEFT has it since 0.17
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise InvalidInput(
            f"PEFT cannot put LoRA on {targets or 'its own choice'!r} of this model: {first_line}"
        ) from error
    adapted.train()
    return adapted


def prepare_for_kbit_training(model: Any) -> Any:
    """PEFT's `prepare_model_for_kbit_training` without the checkpointing that it switches on unasked.

    Freezes the model and puts what is in 16 bits but not quantised (norms, embeddings, output layer) into float32, in
    place. PEFT's own default goes on to reentrant checkpointing of every block and to a hook that makes the embeddings'
    output require a gradient, which costs a replay of every frozen block; under a plan neither is wanted. On a model
    that came through that default already, both are undone.

    Raises `Unsupported` when PEFT is not installed.
    """
    try:
        from peft import prepare_model_for_kbit_training
    except ImportError as error:
        raise Unsupported(f"k-bit training needs the package peft ({error}): pip install 'tightfit[peft]'") from None
    if getattr(model, "is_gradient_checkpointing", False):
        model.gradient_checkpointing_disable()
    for hooks, key in _input_gradient_hooks(model):
        del hooks[key]
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


@contextmanager
def no_input_gradients(model: Any) -> Iterator[int]:
    """Inside, the embeddings' output requires a gradient only if something trainable made it; yields the hooks found.

    `enable_input_require_grads` (called by PEFT, by TRL and by the usual tutorials) puts a hook on the embeddings for
    the sake of reentrant checkpointing, which loses the gradients of a block whose input requires none. Nothing else
    needs it, and it makes autograd save, and a plan replay, the blocks before the first adapter, which get no gradient
    from it. The hooks are put back as they were.
    """
    found = [(hooks, key, hooks[key], list(hooks)) for hooks, key in _input_gradient_hooks(model)]
    for hooks, key, _, _ in found:
        del hooks[key]
    try:
        yield len(found)
    finally:
        for hooks, key, hook, order in found:
            hooks[key] = hook
            for later in order[order.index(key) + 1 :]:
                if later in hooks:
                    hooks.move_to_end(later)


def _input_gradient_hooks(model: Any) -> list[tuple[Any, int]]:
    """Where they are: by name, which is `make_inputs_require_grad(s)` in transformers and in PEFT alike."""
    return [
        (module._forward_hooks, key)
        for module in model.modules()
        for key, hook in module._forward_hooks.items()
        if getattr(hook, "__name__", "") in ("make_inputs_require_grad", "make_inputs_require_grads")
    ]
