"""The head and the loss, a tile of rows at a time: logits, their loss and at once their gradient.

Invariant: sums over tiles are kept in float32 where the parameters' dtype is lower.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tightfit.accelerator import has_wide_products
from tightfit.levers.loss_in_place.loss import torchs_own

#: Bytes of a block of a weight's gradient that is made in a wider dtype before it is added to the sum.
_BLOCK_BYTES = 1 << 25


LOW = (torch.bfloat16, torch.float16)


@dataclass(slots=True)
class TileStats:
    """What happened to deferred logits."""

    losses: int = 0  # cross entropies in tiles
    tiles: int = 0
    whole: int = 0  # times that the logits were made whole, and so the budget not kept
    asked_by: str = ""  # what first asked for them
    witness: Callable[[HeadCall], None] | None = None  # told of every cross entropy in tiles

    def __sub__(self, other: TileStats) -> TileStats:
        return TileStats(
            losses=self.losses - other.losses,
            tiles=self.tiles - other.tiles,
            whole=self.whole - other.whole,
            asked_by=self.asked_by if self.whole > other.whole else "",
        )


def refusal(module: nn.Module) -> str:
    """Why `module` cannot be run a tile at a time; empty when it can."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a TorchScript module"
    for inner in module.modules():
        if isinstance(inner, nn.modules.dropout._DropoutNd) and inner.training and inner.p > 0:
            return "it has active dropout, whose random numbers another order of rows would change"
        if isinstance(inner, nn.modules.batchnorm._NormBase):
            return "it has a norm over the batch, so its rows are not independent"
    if any(p._backward_hooks for p in module.parameters()):
        return "its parameters have gradient hooks, which would run once per tile"
    return ""


@dataclass(frozen=True, slots=True)
class Autocast:
    kind: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device: torch.device) -> Autocast:
        return cls(device.type, torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type))

    def again(self) -> contextlib.AbstractContextManager[Any]:
        # no cache: a copy made here would outlive the tile, with a history that ends in it
        if not self.enabled and not torch.is_autocast_enabled(self.kind):
            return contextlib.nullcontext()
        return torch.autocast(self.kind, enabled=self.enabled, dtype=self.dtype, cache_enabled=False)


@dataclass(slots=True)
class Head:
    """A head as it was called once."""

    module: nn.Module
    forward: Callable[..., torch.Tensor]
    rows: int  # of a tile
    stats: TileStats
    autocast: Autocast
    parameters: tuple[nn.Parameter, ...]  # those that are trained

    @property
    def is_linear(self) -> bool:
        """A plain linear layer, whose products can be written into the sums directly."""
        if type(self.module) is not nn.Linear or getattr(self.forward, "__func__", None) is not nn.Linear.forward:
            return False
        weight = self.module.weight
        if type(weight) is not nn.Parameter and type(weight.data).__name__ != "FakeTensor":
            return False
        return not (self.autocast.enabled and weight.dtype is torch.float64)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        with self.autocast.again():
            return self.forward(hidden)


def applied(chain: Sequence[Callable[[torch.Tensor], torch.Tensor]], logits: torch.Tensor) -> torch.Tensor:
    for each in chain:
        logits = each(logits)
    return logits


@dataclass(slots=True)
class Job:
    """One cross entropy in tiles, without its tensors."""

    head: Head
    chain: tuple[Callable[[torch.Tensor], torch.Tensor], ...]
    reduction: str
    ignore_index: int
    label_smoothing: float
    wants: list[bool] = field(default_factory=list)  # gradients of the hidden states and of each parameter

    def spans(self, rows: int) -> Iterator[slice]:
        for at in range(0, rows, self.head.rows):
            yield slice(at, min(at + self.head.rows, rows))

    def loss_of(self, logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        return torchs_own(
            applied(self.chain, logits), target, weight, ignore_index=self.ignore_index,
            reduction="none" if self.reduction == "none" else "sum", label_smoothing=self.label_smoothing,
        )  # fmt: skip


@dataclass(slots=True)
class HeadCall:
    """What one cross entropy in tiles was given: enough to compute it in other ways."""

    job: Job
    hidden: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor | None

    def tiled(self) -> dict[str, torch.Tensor]:
        """Loss and gradients, by name, in tiles."""
        hidden = self.hidden.detach().requires_grad_()
        loss: torch.Tensor = TiledLoss.apply(self.job, hidden, self.target, self.weight, *self.job.head.parameters)
        return self._named(loss, hidden, self.job.head.parameters)

    def untiled(self) -> dict[str, torch.Tensor]:
        """The same by the ordinary head."""
        hidden = self.hidden.detach().requires_grad_()
        loss = self._loss(self.job.head.logits(hidden), self.target)
        return self._named(loss, hidden, self.job.head.parameters)

    def in_float64(self, head: nn.Module, rows: int) -> dict[str, torch.Tensor]:
        """The same by `head`, a copy in float64; `rows` at a time, since sums are near exact there."""
        trained = [p for p in head.parameters() if p.requires_grad]
        hidden = self.hidden.detach().double().requires_grad_()
        divisor: Any = 1
        if self.job.reduction == "mean":
            divisor = _denominator(self.target, self.weight, self.job).double()
        weight = None if self.weight is None else self.weight.double()
        total = hidden.new_zeros(self.target.shape if self.job.reduction == "none" else ())
        for at in range(0, hidden.shape[0], rows):
            part = slice(at, at + rows)
            piece = self.job.loss_of(head(hidden[part]), self.target[part], weight) / divisor
            piece.sum().backward()
            if self.job.reduction == "none":
                total[part] = piece.detach()
            else:
                total += piece.detach()
        found = {"loss": total, "hidden states": hidden.grad}
        names = [name for name, p in self.job.head.module.named_parameters() if p.requires_grad]
        return found | {name: p.grad for name, p in zip(names, trained, strict=True)}  # type: ignore[return-value]

    def _loss(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        job = self.job
        return torchs_own(
            applied(job.chain, logits), target, self.weight, ignore_index=job.ignore_index,
            reduction=job.reduction, label_smoothing=job.label_smoothing,
        )  # fmt: skip

    def _named(
        self, loss: torch.Tensor, hidden: torch.Tensor, parameters: Sequence[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        names = [name for name, p in self.job.head.module.named_parameters() if p.requires_grad]
        found = torch.autograd.grad(loss.sum(), [hidden, *parameters])
        return {"loss": loss.detach(), "hidden states": found[0], **dict(zip(names, found[1:], strict=True))}


class TiledLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, job: Job, hidden: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, *parameters: Any
    ) -> torch.Tensor:
        job.wants = [ctx.needs_input_grad[1], *ctx.needs_input_grad[4:]]
        dtypes = {hidden.dtype, job.head.autocast.dtype if job.head.autocast.enabled else hidden.dtype}
        # a gradient of low precision that is made before its scale is known is rounded once more, or vanishes
        known = job.reduction == "mean" or (job.reduction == "sum" and not dtypes & set(LOW))
        ctx.at_once = known and torch.float16 not in dtypes and any(job.wants)
        ctx.job = job
        tiles = _Tiles(job, hidden, target, weight, parameters)
        denominator = _denominator(target, weight, job) if job.reduction == "mean" else None
        if ctx.at_once:
            scale = None
            if denominator is not None:  # nothing but ignored rows: the loss is 0 / 0, the gradient zero
                scale = torch.where(denominator > 0, denominator.reciprocal(), 0)
            loss = tiles.run(scale, gradients=True, loss=True)
            ctx.save_for_backward(*tiles.gradients())
        else:
            loss = tiles.run(None, gradients=False, loss=True)
            ctx.save_for_backward(hidden, target, weight, denominator, *parameters)
        assert loss is not None
        if denominator is not None:
            loss = loss / denominator.to(loss.dtype)
        return loss.to(tiles.loss_dtype)

    @staticmethod
    def backward(ctx: Any, *incoming: torch.Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the plan in force computes the head and its loss in tiles, so the loss has no second derivative; "
                "remove the plan, or make it without the lever TILE, to use create_graph=True"
            )
        (gradient,) = incoming
        job = ctx.job
        if ctx.at_once:
            keep = torch._C._autograd._get_current_graph_task_keep_graph()
            found = iter(ctx.saved_tensors)
            made = [next(found) if wanted else None for wanted in job.wants]
            scaled = [None if each is None else each * gradient if keep else each.mul_(gradient) for each in made]
        else:
            hidden, target, weight, denominator, *parameters = ctx.saved_tensors
            tiles = _Tiles(job, hidden, target, weight, parameters)
            if denominator is not None:
                gradient = torch.where(denominator > 0, gradient / denominator, 0).to(gradient.dtype)
            tiles.run(gradient, gradients=True, loss=False)
            scaled = []
            found = iter(tiles.gradients())
            scaled = [next(found) if wanted else None for wanted in job.wants]
        return None, scaled[0], None, None, *scaled[1:]


def _denominator(target: torch.Tensor, weight: torch.Tensor | None, job: Job) -> torch.Tensor:
    """What the mean divides by: the rows that are not ignored, or their classes' weights. A number on the device."""
    counted = target != job.ignore_index
    if weight is None:
        return counted.sum().to(torch.float32)
    return (weight[torch.where(counted, target, 0)] * counted).sum()


def unhooked() -> contextlib.AbstractContextManager[Any]:
    """A tile's own graph lives and dies in the tile: nobody else's hooks may see what it saves."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


class _Tiles:
    """The sums of one pass over the tiles."""

    def __init__(
        self,
        job: Job,
        hidden: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor | None,
        parameters: Sequence[torch.Tensor],
    ) -> None:
        self.job, self.target, self.class_weight, self.parameters = job, target, weight, parameters
        self.of_hidden: torch.Tensor | None = None
        self.sums: list[torch.Tensor | None] = []
        self.shape = hidden.shape
        self.hidden = hidden
        self.loss_dtype = torch.float32

    def run(self, incoming: torch.Tensor | None, *, gradients: bool, loss: bool) -> torch.Tensor | None:
        """The loss before it is divided: a sum, or one number per row. `incoming`: the gradient of that."""
        job, stats = self.job, self.job.head.stats
        wants = job.wants if gradients else [False] * len(job.wants)
        if wants[0]:
            self.of_hidden = torch.empty(self.shape, dtype=self.hidden.dtype, device=self.hidden.device)
        self.sums = [
            torch.zeros(p.shape, dtype=torch.float32 if p.dtype in LOW else p.dtype, device=p.device)
            if wanted
            else None
            for p, wanted in zip(self.parameters, wants[1:], strict=True)
        ]
        tile = self._linear_tile() if job.head.is_linear else self._tile
        total: torch.Tensor | None = None
        for rows in job.spans(self.shape[0]):
            stats.tiles += 1
            of_rows = incoming[rows] if incoming is not None and job.reduction == "none" else incoming
            with unhooked():
                piece = tile(rows, of_rows, wants)
            self.loss_dtype = piece.dtype
            if not loss:
                continue
            wide = piece.float() if piece.dtype in LOW and job.reduction != "none" else piece
            if job.reduction == "none":
                if total is None:
                    total = torch.empty(self.shape[0], dtype=wide.dtype, device=wide.device)
                total[rows] = wide
            elif total is None:
                total = wide
            else:
                total += wide
        return total

    def gradients(self) -> list[torch.Tensor]:
        """Of what wants one: hidden states, then parameters, each in its own dtype."""
        found = [] if self.of_hidden is None else [self.of_hidden]
        for parameter, total in zip(self.parameters, self.sums, strict=True):
            if total is not None:
                found.append(total.to(parameter.dtype))
        self.of_hidden, self.sums = None, []
        return found

    def _scale_of(self, piece: torch.Tensor, incoming: torch.Tensor | None) -> torch.Tensor:
        if incoming is None:
            return torch.ones_like(piece)
        return incoming.to(piece.dtype)

    def _tile(self, rows: slice, incoming: torch.Tensor | None, wants: list[bool]) -> torch.Tensor:
        """Any head: its own forward and autograd, tile by tile."""
        job = self.job
        with torch.set_grad_enabled(any(wants)):
            hidden = self.hidden[rows].detach().requires_grad_(wants[0])
            piece = job.loss_of(job.head.logits(hidden), self.target[rows], self.class_weight)
        if any(wants):
            inputs = [hidden, *self.parameters]
            wanted = [t for t, want in zip(inputs, wants, strict=True) if want]
            with Autocast(hidden.device.type, False, torch.float32).again():
                found = torch.autograd.grad(piece, wanted, self._scale_of(piece, incoming), allow_unused=True)
            made: Iterator[torch.Tensor | None] = iter(found)
            if wants[0]:
                assert self.of_hidden is not None
                of_hidden = next(made)
                self.of_hidden[rows] = 0 if of_hidden is None else of_hidden
            for total in self.sums:
                if total is not None and (each := next(made)) is not None:
                    total += each
        return piece.detach()

    def _linear_tile(self) -> Callable[[slice, torch.Tensor | None, list[bool]], torch.Tensor]:
        """A plain linear head: its products written where they belong."""
        job = self.job
        module: Any = job.head.module
        weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
        cast = job.head.autocast.dtype if job.head.autocast.enabled else None
        if cast is not None:
            weight, bias = weight.to(cast), None if bias is None else bias.to(cast)
        of_weight = self._sum_of(module.weight)
        of_bias = None if module.bias is None else self._sum_of(module.bias)

        def tile(rows: slice, incoming: torch.Tensor | None, wants: list[bool]) -> torch.Tensor:
            hidden = self.hidden[rows].detach()
            with torch.no_grad(), Autocast(hidden.device.type, False, torch.float32).again():
                hidden = hidden if cast is None else hidden.to(cast)
                logits = functional.linear(hidden, weight, bias)
            with torch.set_grad_enabled(any(wants)):
                logits.requires_grad_(any(wants))
                piece = job.loss_of(logits, self.target[rows], self.class_weight)
            if not any(wants):
                return piece
            with Autocast(hidden.device.type, False, torch.float32).again():
                (of_logits,) = torch.autograd.grad(piece, logits, self._scale_of(piece, incoming))
                piece = piece.detach()
                del logits
                if wants[0]:
                    assert self.of_hidden is not None
                    if self.of_hidden.dtype is of_logits.dtype:
                        torch.mm(of_logits, weight, out=self.of_hidden[rows])
                    else:
                        self.of_hidden[rows] = of_logits @ weight
                if of_weight is not None:
                    _add_product(of_weight, of_logits, hidden)
                if of_bias is not None:
                    of_bias.add_(of_logits.sum(0, dtype=of_bias.dtype))
            return piece

        return tile

    def _sum_of(self, parameter: torch.Tensor) -> torch.Tensor | None:
        # autograd hands a Function its inputs as they are, so a parameter is found by identity
        places = [i for i, each in enumerate(self.job.head.parameters) if each is parameter]
        return self.sums[places[0]] if places and self.sums else None


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """`total += left.T @ right`, summed in `total`'s dtype."""
    if total.dtype is left.dtype:
        total.addmm_(left.t(), right)
        return
    step = max(1, _BLOCK_BYTES // (4 * max(1, left.shape[0] + total.shape[1])))
    native = has_wide_products(left.device)
    wide = right if native else right.to(total.dtype)
    for at in range(0, total.shape[0], step):
        columns = left[:, at : at + step].t()
        if native:
            total[at : at + step] += torch.mm(columns, wide, out_dtype=total.dtype)
        else:
            total[at : at + step].addmm_(columns.to(total.dtype), wide)
