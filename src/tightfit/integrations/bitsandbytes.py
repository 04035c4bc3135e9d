"""4-bit weights from bitsandbytes: nf4, with double quantisation as QLoRA uses them or without.

`quantise` replaces a model's linear layers by bitsandbytes' own 4-bit layer. A layer whose weights are really there is
quantised by bitsandbytes; one on `meta` becomes its twin: packed weights, scales and code books of the same sizes, and
no data, so that a step on fake tensors sees the very layer that a loaded model would have.

Source of the sizes: `bitsandbytes.functional.quantize_4bit` (blocks of 64) and `quantize_blockwise` (blocks of 256 for
the scales); Dettmers et al., "QLoRA", https://arxiv.org/abs/2305.14314, section 3.
Invariant: the output layer and the embeddings keep their dtype, as in transformers. Refused: a missing bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tightfit.core import InvalidInput, Unsupported

__all__ = ["no_repacking", "quantise"]

_BLOCK, _SCALES_BLOCK = 64, 256


def quantise(model: Any, compute_dtype: torch.dtype = torch.bfloat16, *, double: bool = True) -> Any:
    """`model` with every linear layer but its output layer in nf4, frozen, in place. `double`: the scales are quantised
    too (`bnb_4bit_use_double_quant`).

    Raises `Unsupported` without bitsandbytes, `InvalidInput` for a model without linear layers (GPT-2 has `Conv1D`s).
    """
    try:
        from bitsandbytes.nn import Linear4bit
    except ImportError as error:
        raise Unsupported(
            f"qlora needs the package bitsandbytes ({error}): pip install 'tightfit[bitsandbytes]'"
        ) from None
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if type(child) is nn.Linear and child is not head
    ]
    if not found:
        raise InvalidInput(
            f"the {type(model).__name__} has no torch.nn.Linear to put in 4 bits (GPT-2's are Conv1D): use full or lora"
        )
    for module, name, linear in found:
        # made on meta and filled after, so that nothing is allocated twice
        layer: Any = Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=compute_dtype, quant_type="nf4",
            compress_statistics=double, device="meta",
        )  # fmt: skip
        layer.weight = (_twin if linear.weight.is_meta else _packed)(linear.weight, layer, double)
        layer.bias = linear.bias
        layer.train(linear.training)
        setattr(module, name, layer)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.is_loaded_in_4bit = True  # what PEFT asks
    return model


def _packed(weight: torch.Tensor, layer: Any, double: bool) -> Any:
    from bitsandbytes.nn import Params4bit

    packed = Params4bit(
        weight.detach(), requires_grad=False, compress_statistics=double, quant_type="nf4", module=layer
    )._quantize(weight.device)
    return packed


def _twin(weight: torch.Tensor, layer: Any, double: bool) -> Any:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit

    def on_meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    blocks = -(-weight.numel() // _BLOCK)
    scales = offset = None
    if double:
        offset = on_meta()
        scales = QuantState(
            absmax=on_meta(-(-blocks // _SCALES_BLOCK)), code=on_meta(256), blocksize=_SCALES_BLOCK, dtype=torch.float32
        )
    state = QuantState(
        absmax=on_meta(blocks, dtype=torch.uint8 if double else torch.float32), shape=weight.shape, dtype=weight.dtype,
        blocksize=_BLOCK, code=on_meta(16), quant_type="nf4", offset=offset, state2=scales,
    )  # fmt: skip
    packed = Params4bit(
        on_meta((weight.numel() + 1) // 2, 1, dtype=torch.uint8), requires_grad=False, quant_state=state,
        compress_statistics=double, quant_type="nf4", module=layer, bnb_quantized=True,
    )  # fmt: skip
    layer.quant_state = state
    return packed


@contextmanager
def no_repacking(model: Any) -> Iterator[None]:
    """Inside, 4-bit layers on the CPU keep the layout of their weights when they run in evaluation mode.

    bitsandbytes packs a layer's weight for its AVX-512 kernel at the first such forward, and no backward knows that
    layout: training that goes on after an evaluation then has other gradients, without an error.

    Raises `Unsupported` for a model in which a layer was repacked before.
    """
    layers = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    for layer in layers:
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise Unsupported(
                "a 4-bit layer of this model has run in evaluation mode on the CPU and is packed for inference, which "
                "makes its gradients wrong: load the model again before training"
            )
    before = [layer.support_avx512bf16_for_cpu for layer in layers]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.support_avx512bf16_for_cpu = value
