"""Cross entropy that turns its saved log-probabilities into its gradient in place.

Idea: at most peaks three tensors of the logits' size are alive: the log-probabilities that autograd saved, the
gradient of the negative log-likelihood, and the gradient of the softmax. The last two are row-wise, so they can be
made a few rows at a time, by the same kernels, into the bytes of the first. Two thirds of the loss's own peak are
gone, at no recompute.

Invariant: loss and gradients are bit for bit those of `torch.nn.functional.cross_entropy`, since the kernels work row
by row. Refused: double backward (`RuntimeError`); class weights, label smoothing, class probabilities and more than two
dimensions go to torch's own function.

Source: torch's own formulas, aten/src/ATen/native/LossNLL.cpp and SoftMax.cpp.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses import FakeTensor
from torch.nn import functional

from tightfit.step.patches import refuse_compiled

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
# a step traced on fake tensors calls it with those, and its plan has the same lever as the real step's
_PLAIN_TENSORS = (torch.Tensor, FakeTensor)
_aten = torch.ops.aten
torchs_own = functional.cross_entropy
_in_force = 0


def rows_at_once(rows: int, row_bytes: int, least_bytes: int = 2**20) -> int:
    """Rows whose gradient is made together: `least_bytes` of them, or a 64th of all if that is more."""
    return max(1, min(rows, max(least_bytes // max(1, row_bytes), -(-rows // 64))))


def is_plain(input: Any, target: Any, weight: Any, reduction: str, label_smoothing: float) -> bool:
    """Is this a call that `in_place` takes over? Logits (rows, classes), targets class indices (rows,)."""
    return (
        type(input) in _PLAIN_TENSORS
        and type(target) in _PLAIN_TENSORS
        and input.dim() == 2
        and target.dim() == 1
        and not target.is_floating_point()
        and input.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        and weight is None
        and not label_smoothing
        and reduction in _REDUCTIONS
    )


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, target: torch.Tensor, reduction: int, ignore_index: int) -> torch.Tensor:
        log_probabilities = torch.log_softmax(input, 1)
        loss, total_weight = _aten.nll_loss_forward(log_probabilities, target, None, reduction, ignore_index)
        ctx.save_for_backward(log_probabilities, target, total_weight)
        ctx.reduction, ctx.ignore_index = reduction, ignore_index
        out: torch.Tensor = loss
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the plan in force makes the loss's gradient in place, so it has no second derivative; "
                "remove the plan, or make it without levers on the loss, to use create_graph=True"
            )
        (gradient,) = gradients
        saved, target, total_weight = ctx.saved_tensors
        # another backward through this graph will need the log-probabilities as they are
        out = saved.clone() if torch._C._autograd._get_current_graph_task_keep_graph() else saved
        step = rows_at_once(out.shape[0], out.shape[1] * out.element_size())
        for start in range(0, out.shape[0], step):
            rows = slice(start, start + step)
            of_likelihood = _aten.nll_loss_backward(
                gradient[rows] if ctx.reduction == 0 else gradient, out[rows], target[rows], None, ctx.reduction,
                ctx.ignore_index, total_weight,
            )  # fmt: skip
            out[rows] = _aten._log_softmax_backward_data(of_likelihood, out[rows], 1, out.dtype)
            del of_likelihood
        return out, None, None, None


def _replaced(
    make: Callable[..., torch.Tensor], otherwise: Callable[..., torch.Tensor] = torchs_own
) -> Callable[..., torch.Tensor]:
    """`cross_entropy` with torch's signature, `make` called for the plain cases and `otherwise` for the rest."""

    def cross_entropy(
        input: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> torch.Tensor:
        if size_average is None and reduce is None and is_plain(input, target, weight, reduction, label_smoothing):
            return make(input, target, reduction, ignore_index)
        return otherwise(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )  # fmt: skip

    return cross_entropy


def _in_place(input: torch.Tensor, target: torch.Tensor, reduction: str, ignore_index: int) -> torch.Tensor:
    if not (torch.is_grad_enabled() and input.requires_grad):
        return torchs_own(input, target, reduction=reduction, ignore_index=ignore_index)
    if torch.compiler.is_compiling():
        refuse_compiled("the loss is compiled, and the plan in force makes its gradient in place of what it saved")
    if torch.is_autocast_enabled(input.device.type) and input.dtype in (torch.float16, torch.bfloat16):
        input = input.float()  # as autocast does for this function
    loss: torch.Tensor = _CrossEntropy.apply(input, target, _REDUCTIONS[reduction], ignore_index)
    return loss


@contextlib.contextmanager
def in_place() -> Iterator[None]:
    """While open, `torch.nn.functional.cross_entropy` (and `nn.CrossEntropyLoss`) make their gradient in place."""
    global _in_force  # noqa: PLW0603 - several plans may be in force, and there is one function to replace
    _in_force += 1
    functional.cross_entropy = _replaced(_in_place)
    try:
        yield
    finally:
        _in_force -= 1
        if not _in_force:
            functional.cross_entropy = torchs_own


@contextlib.contextmanager
def out_of_place() -> Iterator[None]:
    """While open, `torch.nn.functional.cross_entropy` is what it is without any plan: plans of other models may be in
    force while one is recorded."""
    before = functional.cross_entropy
    if _in_force:
        functional.cross_entropy = torchs_own
    try:
        yield
    finally:
        functional.cross_entropy = before


@contextlib.contextmanager
def watched(note: Callable[[bool], None]) -> Iterator[None]:
    """While open, `note(True)` and `note(False)` are called around every call that `in_place` would take over."""
    before = functional.cross_entropy

    def spy(input: torch.Tensor, target: torch.Tensor, reduction: str, ignore_index: int) -> torch.Tensor:
        note(True)
        try:
            return before(input, target, reduction=reduction, ignore_index=ignore_index)
        finally:
            note(False)

    functional.cross_entropy = _replaced(spy, before)
    try:
        yield
    finally:
        functional.cross_entropy = before
