"""What the engine itself costs: microseconds per op on tensors so small that only the host's work is left.

    python benchmarks/overhead.py     # a minute; writes benchmarks/results/overhead.json

Eight blocks of 100 ops on 4 x 8 tensors, one thread. torch's selective checkpointing keeps the outputs of all matrix
products; tightfit's plan keeps those and nothing else, so both rerun what is left. The contexts take turns; the figures
are medians of what a step, and its forward alone, take beyond the plain model's, divided by the forward's ops.
"""

from __future__ import annotations

import contextlib
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import drawn
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import tightfit
from tightfit.core import Action, Choice, Plan, Status, Trace
from tightfit.plan import every_block
from tightfit.plan.simulate import simulate_choices
from tightfit.step.environment import environment
from tightfit.step.patches import MethodPatch

RESULTS = Path(__file__).parent / "results" / "overhead.json"
PRODUCTS = [torch.ops.aten.addmm.default, torch.ops.aten.mm.default]
REPEATS = 40


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(10):
            x = x + torch.tanh(self.b(torch.relu(self.a(x))) * 1.5)
        return x


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.sum()


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def checkpointed(model: Model, save: list[Any] | None) -> Iterator[None]:
    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        more: Any = {}
        if save is not None:
            more["context_fn"] = functools.partial(create_selective_checkpoint_contexts, save)
        return lambda x: checkpoint(original, x, use_reentrant=False, **more)

    patches = [MethodPatch(block, wrap) for block in model.blocks]
    try:
        yield
    finally:
        for patch in patches:
            patch.undo()


def keeping_products(trace: Trace) -> Plan:
    """The plan that keeps what the selective policy keeps."""
    whole = every_block(trace)
    choices = []
    for choice in whole.choices:
        program = whole.programs[choice.program]
        kept = {v for step in program.steps if "mm" in step.name for v in step.writes}
        actions = tuple(Action.KEEP if v in kept else a for v, a in enumerate(choice.actions))
        choices.append(Choice(unit=choice.unit, actions=actions, signature=choice.signature, program=choice.program))
    line = simulate_choices(trace, tuple(choices))
    return Plan(
        budget_bytes=line.peak_bytes, choices=tuple(choices), status=Status.FEASIBLE, peak_bytes=line.peak_bytes,
        step_seconds=0.0, recompute_seconds=0.0, bound_seconds=0.0, recompute_flops=0, forward_flops=0,
        unplanned_peak_bytes=whole.unplanned_peak_bytes, replays=line.replays, trace_digest=trace.digest, versions={},
        programs=whole.programs,
    )  # fmt: skip


def measured(device: torch.device | str, repeats: int = REPEATS) -> dict[str, Any]:
    """What the contexts take beyond the plain model's step on `device`, per op of its forward."""
    torch.manual_seed(0)
    model, x = Model().to(device), torch.randn(4, 8, device=device)
    drained = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    with Count() as count:
        model(x)
    trace = tightfit.trace(model, x)
    contexts: dict[str, Callable[[], Any]] = {
        "plain": contextlib.nullcontext,
        "torch.utils.checkpoint": lambda: checkpointed(model, None),
        "torch's selective checkpointing": lambda: checkpointed(model, PRODUCTS),
        "tightfit, the same kept": lambda: tightfit.apply(model, keeping_products(trace)),
        "tightfit, every block": lambda: tightfit.apply(model, every_block(trace)),
    }
    seconds: dict[str, dict[str, list[float]]] = {name: {"forward": [], "step": []} for name in contexts}
    for repeat in range(repeats):
        for name, context in contexts.items():
            with context():
                model(x).backward()
                drained()
                started = time.perf_counter()
                loss = model(x)
                drained()
                middle = time.perf_counter()
                loss.backward()
                drained()
                if repeat:
                    seconds[name]["forward"].append(middle - started)
                    seconds[name]["step"].append(time.perf_counter() - started)
    median = {name: {part: statistics.median(s) for part, s in parts.items()} for name, parts in seconds.items()}
    extra = {
        name: {
            f"{part}_microseconds_per_op": round((median[name][part] - median["plain"][part]) / count.ops * 1e6, 2)
            for part in ("forward", "step")
        }
        for name in contexts
        if name != "plain"
    }
    selective, ours = extra["torch's selective checkpointing"], extra["tightfit, the same kept"]
    return {
        "ops": count.ops, "extra": extra,
        "plain_step_microseconds_per_op": round(median["plain"]["step"] / count.ops * 1e6, 2),
        "ratio": {part: round(ours[part] / selective[part], 3) for part in selective},
    }  # fmt: skip


def main() -> int:
    torch.set_num_threads(1)
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "environment": environment(), **measured("cpu"),
    }  # fmt: skip
    print(json.dumps({k: v for k, v in record.items() if k != "environment"}, indent=1))
    drawn.write(RESULTS, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
