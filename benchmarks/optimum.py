"""How near plans of small steps come to the best there is: against the proven bound, and against a search of its own.

    python benchmarks/optimum.py              # writes benchmarks/results/optimum.json
    python benchmarks/optimum.py --only mlp   # one step, the others as they were

Eight small steps with five budgets each, from the lowest peak up. Seconds are those of a nominal CPU, so that the
machine does not matter. A row has two judges. The first is the plan's own bound: no choice for the units takes fewer
seconds. The second knows nothing of the planner: it changes what one unit, or all alike, keep, value by value, asks
the referee (`plan.simulate`), and keeps what is better, until no change is. What it finds beyond the plan is in the
row. The lowest peak is judged by the same search.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import drawn

os.environ.setdefault("KINETO_LOG_LEVEL", "6")

import torch
import transformers
from by_hand import Turns
from torch import nn

import tightfit
from tightfit.core import Action, Choice, Plan, Program, Trace, Unsupported
from tightfit.device.cost import NOMINAL_CPU, retimed
from tightfit.integrations.peft import add_lora
from tightfit.plan import lowest
from tightfit.plan.program import kept_values, shared
from tightfit.plan.simulate import simulate_choices

RESULTS = Path(__file__).parent / "results" / "optimum.json"
SHARES = (0.0, 0.15, 0.3, 0.5, 0.75)  # of the way from the lowest peak to the step's own
WALKS = 1500  # of the referee, for each search


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.first, self.second = (nn.BatchNorm2d(channels) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.second(self.two(torch.relu(self.first(self.one(x))))))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 10)
        self.blocks = nn.ModuleList(Residual(16) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 1, 1)
        self.down = nn.ModuleList(Residual(16) for _ in range(3))
        self.middle = Residual(16)
        self.up = nn.ModuleList(Residual(16) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, across = self.stem(x), []
        for block in self.down:
            x = block(x)
            across.append(x)
            x = nn.functional.avg_pool2d(x, 2)
        x = self.middle(x)
        for block in self.up:
            x = block(nn.functional.interpolate(x, scale_factor=2) + across.pop())
        return self.head(x)


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = (
            nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 128)) for _ in range(8)
        )
        self.layers, self.head = nn.ModuleList(layers), nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


class Mean(nn.Module):
    """A model with a loss at its end."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).square().mean()


def words(model: nn.Module, rows: int, length: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    ids = torch.randint(0, 500, (rows, length))
    return model.train(), {"input_ids": ids, "labels": ids}


def llama(**more: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=500, hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, **more
    )
    return transformers.LlamaForCausalLM(config)


def mixtral() -> Any:
    config = transformers.MixtralConfig(
        vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=500, n_embd=96, n_layer=4, n_head=4)
    return transformers.GPT2LMHeadModel(config)


STEPS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "gpt2": lambda: words(gpt2(), 2, 96),
    "llama": lambda: words(llama(), 2, 96),
    "llama-lora": lambda: words(add_lora(llama(), rank=8), 2, 96),
    "mlp": lambda: (Mean(Perceptron()), torch.randn(256, 128)),
    "resnet": lambda: (Mean(ResNet()), torch.randn(8, 3, 32, 32)),
    "unet": lambda: (Mean(UNet()), torch.randn(4, 3, 32, 32)),
    "moe": lambda: words(mixtral(), 2, 64),
    "gru": lambda: (Mean(Turns()), torch.randn(32, 40, 32)),
}


class Search:
    """Changes of what one unit, or all alike, keep, judged by the referee alone."""

    def __init__(self, trace: Trace) -> None:
        self.trace, self.walks = trace, 0
        self.programs: dict[str, Program] = {}
        calls: dict[str, list[Program]] = {}
        for frame in trace.frames:
            calls.setdefault(frame.unit, []).append(trace.programs[frame.id])
        for unit in trace.units:
            program = shared(calls[unit.path])
            if program is not None and not unit.pinned and program.needed:
                self.programs[unit.path] = program
        alike: dict[str, list[str]] = {}
        for unit in trace.units:
            if unit.path in self.programs:
                alike.setdefault(unit.digest, []).append(unit.path)
        self.groups = [paths for paths in alike.values() if len(paths) > 1]

    def choices(self, kept: dict[str, frozenset[int]]) -> tuple[Choice, ...]:
        return tuple(
            Choice(
                unit=unit.path, signature=unit.signature, program=unit.digest,
                actions=tuple(
                    Action.KEEP if v in kept[unit.path] else Action.RECOMPUTE
                    for v in range(self.programs[unit.path].values)
                ),
            )
            for unit in self.trace.units if unit.path in kept
        )  # fmt: skip

    def judged(self, kept: dict[str, frozenset[int]]) -> tuple[int, float]:
        self.walks += 1
        try:
            line = simulate_choices(self.trace, self.choices(kept))
        except Unsupported:
            return sys.maxsize, float("inf")
        return line.peak_bytes, line.recompute_seconds

    def changes(self, kept: dict[str, frozenset[int]]) -> Iterator[dict[str, frozenset[int]]]:
        for paths in (*self.groups, *([path] for path in self.programs)):
            program = self.programs[paths[0]]
            values = sorted({v for step in program.steps for v in step.reads}.union(program.needed) - set(program.held))
            for value in values:
                yield kept | {path: kept[path] ^ {value} for path in paths}

    def improved(
        self, kept: dict[str, frozenset[int]], better: Callable[[tuple[int, float], tuple[int, float]], bool]
    ) -> tuple[int, float]:
        """The best that single changes lead to from `kept`."""
        best = self.judged(kept)
        self.walks = 0
        moved = True
        while moved and self.walks < WALKS:
            moved = False
            for changed in self.changes(kept):
                if self.walks >= WALKS:
                    break
                found = self.judged(changed)
                if better(found, best):
                    best, kept, moved = found, changed, True
        return best


def kept_by(plan: Plan, search: Search) -> dict[str, frozenset[int]]:
    by_unit = {choice.unit: choice for choice in plan.choices}
    return {
        path: kept_values(by_unit[path].actions) if path in by_unit else frozenset(range(program.values))
        for path, program in search.programs.items()
    }


def rows_of(name: str) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    model, batch = STEPS[name]()
    trace = retimed(tightfit.trace(model, batch), NOMINAL_CPU)
    step_seconds = sum(op.seconds for op in trace.ops)
    levers = ("recompute",)
    unplanned = tightfit.simulate(trace).peak_bytes
    low = lowest(trace, levers=levers)
    search = Search(trace)
    fixed = sum(trace.static_bytes.values())

    def lower(one: tuple[int, float], other: tuple[int, float]) -> bool:
        return one[0] < other[0]

    least, _ = search.improved(kept_by(low, search), lower)
    for share in SHARES:
        budget = low.peak_bytes + int(share * (unplanned - low.peak_bytes))
        began = time.process_time()
        plan = tightfit.plan(trace, budget, levers=levers)
        spent = time.process_time() - began

        def cheaper(one: tuple[int, float], other: tuple[int, float], budget: int = budget) -> bool:
            return one[0] <= budget and one[1] < other[1] - 1e-12

        _, seconds = search.improved(kept_by(plan, search), cheaper)
        proven = step_seconds + plan.bound_seconds
        yield {
            "step": name,
            "share": share,
            "status": plan.status.value,
            "cut_in_segments": plan.bound_seconds == 0.0,
            "recompute_of_step": round(plan.recompute_seconds / step_seconds, 5),
            "gap_of_step": round((plan.recompute_seconds - plan.bound_seconds) / proven, 5),
            "search_gains_of_step": round((plan.recompute_seconds - seconds) / step_seconds, 5),
            "lowest_activation_bytes": low.peak_bytes - fixed,
            "search_lowers_peak_by": round((low.peak_bytes - least) / low.peak_bytes, 5),
            "plan_seconds": round(spent, 2),
        }


def main() -> int:
    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=STEPS, help="this step alone")
    asked = parser.parse_args()
    names = [asked.only] if asked.only else list(STEPS)
    record = drawn.record_of_rows(RESULTS, rows_of, names, order=list(STEPS), key="step", then="share")
    drawn.write(RESULTS, record, parts=names)
    return 0


if __name__ == "__main__":
    sys.exit(main())
