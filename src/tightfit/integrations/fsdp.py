"""FSDP2 without the other processes: a model on `meta`, sharded as on many ranks, for a trace on fake tensors.

Idea: torch's own `fully_shard` runs on a process group that pretends, so what rank 0 would gather, keep and reduce
is seen and not modelled. Rank 0 never holds less than another rank: FSDP2 gives the first ranks the larger shards.

Invariant: the process group is gone afterwards, and the model that was given is untouched. Refused: 4-bit weights,
which FSDP2 does not shard, and a process that is one of a real group already.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tightfit.core import HOST_KIND, Unsupported
from tightfit.step.modules import find_units
from tightfit.step.parallel import require_fsdp2

__all__ = ["shard_bytes", "sharded"]


@contextlib.contextmanager
def sharded(
    model: nn.Module, world_size: int, param_dtype: torch.dtype | None = None, *, reshards: bool = True
) -> Iterator[nn.Module]:
    """A copy of `model` (on `meta`) whose units and rest are sharded over `world_size` ranks; this process is rank 0.

    `param_dtype`: of the gathered weights, as in `MixedPrecisionPolicy`; gradients are then reduced in float32.
    `reshards`: are a unit's weights given back between its forward and its backward?
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    require_fsdp2()
    if any(getattr(p, "quant_state", None) is not None for p in model.parameters()):
        raise Unsupported("4-bit weights cannot be sharded by FSDP2: use strategy ddp, or method lora")
    if dist.is_initialized():
        raise Unsupported("this process belongs to a process group, and a pretended one would take its place")
    twin = copy.deepcopy(model)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        how: dict[str, Any] = {"mesh": init_device_mesh(HOST_KIND, (world_size,)), "reshard_after_forward": reshards}
        if param_dtype is not None:
            how["mp_policy"] = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
        for path, unit in find_units(twin).items():
            if path:
                fully_shard(unit, **how)
        fully_shard(twin, **how)
        yield twin
    finally:
        dist.destroy_process_group()


def shard_bytes(tensor: torch.Tensor, world_size: int, granule_bytes: int = 1) -> int:
    """Bytes of rank 0's shard: the first of `world_size` parts of the rows."""
    rows = tensor.shape[0] if tensor.dim() else 1
    size_bytes = tensor.numel() * tensor.element_size() // max(1, rows) * -(-rows // world_size)
    return -(-size_bytes // granule_bytes) * granule_bytes
