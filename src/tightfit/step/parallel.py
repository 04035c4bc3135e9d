"""What torch's own parallel wrappers do to one process's step: DDP's buckets, FSDP2's shards.

Idea: a wrapper changes where weights and gradients are, not what a unit computes. Under FSDP2 (`fully_shard`) a unit's
weights exist whole only while it runs: in storages that are emptied and filled again, which a trace has to see as bytes
that come and go while the weights stay the same values. Under DDP the buckets are there all the time.

Invariant: nothing here sends anything. Refused: FSDP1, tensor parallelism, gradients that wait to be reduced while
somebody wants to run steps of his own (`Unsupported`).
"""

from __future__ import annotations

import contextlib
import enum
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from tightfit.core import Unsupported

__all__ = [
    "Strategy",
    "as_new",
    "bucket_bytes",
    "forget_step",
    "gradients_are_views",
    "gradients_wait",
    "inside",
    "local_of",
    "require_fsdp2",
    "require_no_step_under_way",
    "resharded",
    "resizes_told",
    "steps_together",
    "strategy_of",
    "unsynchronised",
]


class Strategy(enum.Enum):
    """How a step is spread over processes."""

    ONE = "one"
    DDP = "ddp"
    FSDP2 = "fsdp2"


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a sharded tensor; any other tensor itself."""
    local = getattr(tensor, "_local_tensor", None)
    return local if isinstance(local, torch.Tensor) else tensor


def inside(model: nn.Module) -> nn.Module:
    """The model that DDP wraps; any other model itself. Units are named as in it, so one plan serves both."""
    return model.module if _is_ddp(model) else model  # type: ignore[return-value]  # DDP's `module` is typed loosely


def strategy_of(model: nn.Module) -> Strategy:
    """Raises `Unsupported` for the wrappers that are not planned."""
    if _is_ddp(model):
        if getattr(model, "static_graph", False):
            raise Unsupported(
                "DistributedDataParallel(static_graph=True) counts what its first step does, and a trace would be that "
                "step: leave static_graph out; a plan's replays run no hooks, so DDP does not need it"
            )
        return Strategy.DDP
    for path, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise Unsupported(
                f"{path or 'the model'} is sharded by FSDP1, which hides its weights in one flat tensor; use FSDP2: "
                "torch.distributed.fsdp.fully_shard, or fsdp_version: 2 in accelerate's config"
            )
        if _is_ddp(module):
            raise Unsupported(f"{path} is a DistributedDataParallel inside the model: wrap the whole model once")
    if not any(True for _ in _sharded(model)):
        return Strategy.ONE
    require_fsdp2()
    return Strategy.FSDP2


def _is_ddp(model: nn.Module) -> bool:
    return type(model).__name__ == "DistributedDataParallel"


def _sharded(model: nn.Module) -> Iterator[Any]:
    """Every module that `fully_shard` was called on."""
    library: Any = sys.modules.get("torch.distributed.fsdp")
    if library is None:  # then nobody can have called it
        return
    for module in model.modules():
        if isinstance(module, library.FSDPModule):
            yield module


def require_fsdp2() -> None:
    """Raises `Unsupported` where steps of FSDP2 cannot be recorded: they have to be taken back."""
    from torch.distributed.fsdp import FSDPModule

    if not hasattr(FSDPModule, "reset_iter_state"):
        raise Unsupported(
            f"torch {torch.__version__} cannot take back a step of FSDP2 (FSDPModule.reset_iter_state): use torch 2.13 "
            "or later, or DDP"
        )


def _groups(module: Any) -> list[Any]:
    """What FSDP2 gathers together of a module that `fully_shard` was called on."""
    return list(module._get_fsdp_state()._fsdp_param_groups)


def resharded(model: nn.Module) -> bool:
    """Are the weights of some unit gone between its forward and its backward?"""
    return any(group.post_forward_mesh_info is not None for module in _sharded(model) for group in _groups(module))


def require_no_step_under_way(model: nn.Module) -> None:
    """Raises `Unsupported` where steps of one's own would lose gradients that FSDP2 has not reduced yet."""
    if gradients_wait(model):
        raise Unsupported(
            "gradients of earlier micro-batches wait to be reduced (set_requires_gradient_sync(False)), and a trace "
            "would lose them: trace, fit and verify before the first micro-batch, or after the one that reduces"
        )


def forget_step(model: nn.Module) -> None:
    """Have FSDP2 take the last step for lost: a forward whose backward never came, gradients that were not reduced."""
    for module in _sharded(model):
        state = module._get_fsdp_state()
        for group in _groups(module):
            for each in group.fsdp_params:
                # from torch 2.15 on gradients accumulate in the whole weight alone
                if "unsharded_accumulated_grad" in vars(each):
                    each.unsharded_accumulated_grad = None
                if getattr(each, "_unsharded_param", None) is not None:
                    each._unsharded_param.grad = None
        if state._is_root:
            module.reset_iter_state()


@contextlib.contextmanager
def as_new(model: nn.Module) -> Iterator[None]:
    """FSDP2 as before its first step inside, whatever it has gathered; afterwards as it was, and so are its weights.

    For steps on other tensors than the model's own, which have been put in their place.
    """
    kept: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def keep(thing: Any) -> Any:
        kept.append((vars(thing), {k: v.copy() if type(v) in (list, dict, set) else v for k, v in vars(thing).items()}))
        return thing

    for module in _sharded(model):
        state = keep(module._get_fsdp_state())
        state._is_root = None
        keep(state._comm_ctx)
        keep(state._state_ctx).all_states = []
        for group in _groups(module):
            keep(group)._reset_sharded_params = False  # look at the weights again
            group._module_fqn = None
            for each in group.fsdp_params:
                keep(each).all_gather_outputs = []
                vars(each).pop("_unsharded_param", None)
    try:
        with warnings.catch_warnings():  # it compares the addresses of its shards, which fake ones do not have
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor", category=UserWarning)
            yield
    finally:
        for table, before in reversed(kept):  # what several modules share was kept first as it was
            table.clear()
            table.update(before)


def gradients_wait(model: nn.Module) -> bool:
    """Does FSDP2 hold whole gradients that no reduction has taken yet?"""
    for module in _sharded(model):
        for group in _groups(module):
            if group._partial_reduce_output is not None:
                return True
            for each in group.fsdp_params:
                whole = getattr(each, "_unsharded_param", None)
                if each.unsharded_accumulated_grad is not None or (whole is not None and whole.grad is not None):
                    return True
    return False


def steps_together(model: nn.Module) -> bool:
    """Do all ranks come to the forward that is about to run? Not under DDP's `no_sync` and `join`."""
    if not _is_ddp(model):
        return True
    ddp: Any = model
    return bool(ddp.require_backward_grad_sync) and not ddp._join_config.enable


@contextlib.contextmanager
def unsynchronised(model: nn.Module) -> Iterator[None]:
    """Steps inside send no gradients and no buffers where DDP would: a forward whose backward never comes is an error
    to it. Enter it before whatever puts attributes back."""
    if not _is_ddp(model):
        yield
        return
    ddp: Any = model
    forward_sync = ddp.require_forward_param_sync
    with ddp.no_sync():
        ddp.require_forward_param_sync = False
        try:
            yield
        finally:
            ddp.require_forward_param_sync = forward_sync


def bucket_bytes(model: nn.Module) -> int:
    """What DDP holds beside the gradients: buckets of their size, or the gradients themselves if these are views."""
    if not _is_ddp(model):
        return 0
    ignored = set(getattr(model, "parameters_to_ignore", ()))
    names = dict(inside(model).named_parameters())
    return sum(p.numel() * p.element_size() for n, p in names.items() if p.requires_grad and n not in ignored)


def gradients_are_views(model: nn.Module) -> bool:
    """Are DDP's gradients views of its buckets?"""
    return _is_ddp(model) and bool(getattr(model, "gradient_as_bucket_view", False))


@contextlib.contextmanager
def resizes_told(tell: Callable[[torch.UntypedStorage, int], None]) -> Iterator[None]:
    """Call `tell(storage, bytes before)` after each change of a storage's size, which no op of the dispatcher does."""
    original = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> Any:
        before = storage.nbytes()
        out = original(storage, size)
        if storage.nbytes() != before:
            tell(storage, before)
        return out

    torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign,assignment]  # its stub is of another class
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = original  # type: ignore[method-assign]
