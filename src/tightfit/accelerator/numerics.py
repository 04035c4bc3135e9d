"""The process-wide switches that decide which bits a kernel gives: TF32, reduced precision, determinism, libraries and
which of them is preferred, the order in which attention kernels are asked.

A forward under one setting and its replay under another would not give the same bits, so a replay runs under the
switches of its forward. Older and newer switches of torch stand for the same thing, and torch refuses to read an older
one after the newer was set. Such a switch is left out, because the newer one tells it all.

Invariant: what is changed for a replay is as it was afterwards, also when the replay raises. Other threads of the
process see the change meanwhile: torch keeps these switches for the process, not for a thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["Switches", "restored", "switches"]

#: The values of all switches, in order; None for one that torch does not tell.
Switches = tuple[Any, ...]

_C: Any = torch._C


def _flag(name: str) -> tuple[Callable[[], Any], Callable[[Any], None]] | None:
    read, write = getattr(_C, f"_get_{name}", None), getattr(_C, f"_set_{name}", None)
    if read is None or write is None:
        return None
    return read, lambda value: write(*value) if isinstance(value, tuple) else write(value)


def _precision(backend: str, op: str) -> tuple[Callable[[], Any], Callable[[Any], None]] | None:
    if not hasattr(_C, "_get_fp32_precision_getter"):
        return None
    return (
        lambda: _C._get_fp32_precision_getter(backend, op),
        lambda value: _C._set_fp32_precision_setter(backend, op, value),
    )


def _determinism() -> tuple[Callable[[], Any], Callable[[Any], None]]:
    def write(value: tuple[bool, bool]) -> None:
        _C._set_deterministic_algorithms(value[0], warn_only=value[1])

    return lambda: (_C._get_deterministic_algorithms(), _C._get_deterministic_algorithms_warn_only()), write


def _attention_order() -> tuple[Callable[[], Any], Callable[[Any], None]] | None:
    """What `sdpa_kernel(..., set_priority=True)` sets."""
    if not hasattr(_C, "_set_sdp_priority_order"):
        return None
    return lambda: tuple(_C._get_sdp_priority_order()), lambda value: _C._set_sdp_priority_order(list(value))


def _attention_kernel(name: str) -> tuple[Callable[[], Any], Callable[[Any], None]] | None:
    read, write = getattr(_C, f"_get_{name}_sdp_enabled", None), getattr(_C, f"_set_sdp_use_{name}", None)
    return None if read is None or write is None else (read, write)


#: The older before the newer, and what stands for all before what stands for one: each setting may change later ones.
_SWITCHES = tuple(
    found
    for found in (
        *(
            _flag(name)
            for name in (
                "float32_matmul_precision", "cublas_allow_tf32", "cudnn_allow_tf32",
                "cublas_allow_fp16_reduced_precision_reduction", "cublas_allow_bf16_reduced_precision_reduction",
                "cublas_allow_fp16_accumulation", "math_sdp_allow_fp16_bf16_reduction",
                "cudnn_enabled", "cudnn_benchmark", "cudnn_deterministic", "mkldnn_enabled", "mkldnn_deterministic",
            )
        ),
        _precision("generic", "all"),
        *(_precision(backend, op) for backend in ("cuda", "mkldnn") for op in ("all", "matmul", "conv", "rnn")),
        _determinism(),
        *(_flag(name) for name in ("blas_preferred_backend", "linalg_preferred_backend")),
        *((_flag("rocm_fa_preferred_backend"),) if torch.version.hip else ()),
        _flag("cublaslt_prefer_grouped_gemm"),
        _attention_order(),
        *map(_attention_kernel, ("fa3", "overrideable")),
    )
    if found is not None
)  # fmt: skip


def switches() -> Switches:
    """How they stand now."""
    return tuple(_told(read) for read, _ in _SWITCHES)


def _told(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RuntimeError:  # an older switch, after the newer one was set
        return None


@contextlib.contextmanager
def restored(wanted: Switches) -> Iterator[None]:
    """They stand as `wanted` inside."""
    before = switches()
    if before == wanted:
        yield
        return
    _set(wanted)
    try:
        yield
    finally:
        _set(before)


def _set(wanted: Switches) -> None:
    for (read, write), value in zip(_SWITCHES, wanted, strict=True):
        if value is not None and _told(read) != value:
            write(value)
