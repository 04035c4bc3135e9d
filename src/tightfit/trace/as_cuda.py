"""CUDA's kernels on fake CPU tensors: the attention that CUDA would choose, its dropout masks, its scratch.

Sources: aten/src/ATen/native/transformers/cuda for the sizes of scratch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_aten = torch.ops.aten


def _round_up(number: int, to: int) -> int:
    return -(-number // to) * to


def _flash_backward_scratch(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> int:
    """Bytes of `dq_accum` and `softmax_d` in float32, and of expanded key and value gradients where heads are shared.

    Source: aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, `mha_bwd`.
    """
    batch, heads, tokens, width = query.shape
    rows = _round_up(tokens, 128)
    padded = 64 if width <= 64 else _round_up(width, 32)
    scratch = batch * heads * rows * (padded + 1) * 4
    if key.size(1) != heads:
        scratch += 2 * batch * key.size(2) * heads * _round_up(width, 8) * key.element_size()
    return int(scratch)


def _efficient_backward_scratch(grad: torch.Tensor, query: torch.Tensor, *_: Any, **__: Any) -> int:
    """Bytes of `delta`, the row sums of gradient times output, and of its rounded float32 rows.

    Source: aten/src/ATen/native/transformers/cuda/attention_backward.cu, `_efficient_attention_backward`.
    """
    batch, heads, tokens, width = query.shape
    accumulators = 0 if query.dtype is torch.float32 else batch * heads * tokens * width * 4
    return int(batch * heads * _round_up(tokens, 32) * 4 + accumulators)


CUDA_SCRATCH: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_backward.default: _flash_backward_scratch,
    _aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward_scratch,
}


_HALF = frozenset({torch.float16, torch.bfloat16})


def attention_like_cuda(flash: bool) -> Callable[..., torch.Tensor]:
    """`scaled_dot_product_attention` with the kernel that CUDA takes. It tries flash, memory-efficient and math, in
    this order.

    Source: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, `select_sdp_backend`.
    """

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        width = query.size(-1)
        half = query.dtype in _HALF
        same_heads = query.size(-3) == key.size(-3)
        scale = width**-0.5 if scale is None else scale
        dense = query.dim() == 4 and value.size(-1) == width
        if dense and flash and half and attn_mask is None and width <= 256:
            pad = -width % 8
            if pad:
                query, key, value = (nn.functional.pad(t, (0, pad)) for t in (query, key, value))
            out: torch.Tensor = _aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, scale=scale
            )[0]
            return out[..., :width] if pad else out
        if dense and same_heads and width % (8 if half else 4) == 0:
            bias = attn_mask
            if bias is not None:
                if bias.dtype is torch.bool:
                    bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill_(bias.logical_not(), float("-inf"))
                columns = bias.size(-1)
                if columns % 8:  # the kernel reads rows of 16 bytes
                    bias = nn.functional.pad(bias, (0, -columns % 8))[..., :columns]
                bias = bias.expand(query.size(0), query.size(1), query.size(2), key.size(2))
            trains = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
            out = _aten._scaled_dot_product_efficient_attention(
                query, key, value, bias, trains, dropout_p, is_causal, scale=scale
            )[0]
            return out
        out = _aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )[0]
        return out

    return attention


def dropout_like_cuda(
    input: torch.Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> torch.Tensor:
    """CUDA's fused dropout, which keeps a boolean mask. Source: aten/src/ATen/native/Dropout.cpp."""
    if not training or p == 0:
        return input
    out: torch.Tensor = _aten.native_dropout(input, p, True)[0]
    return input.copy_(out) if inplace else out
