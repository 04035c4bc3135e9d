"""The steps that are registered before any card is seen, and how each of them is built.

Idea: one builder serves both sides. `step_of` makes a case's model, batch and optimizer on `meta` for the forecast and
on the card for the measurement, with random weights of the published shape. So what was forecast is what is measured.
Tables A to D are public ones (`TABLES` says whose, and what was assumed); S are small steps of several architectures
and methods, where nothing was published.

Invariant: nothing is downloaded. Refused: nothing; what a published row needs and tightfit cannot forecast yet is named
in `TABLES` and has no figure.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "6")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["TIGHTFIT_CATALOG"] = str(Path(__file__).with_name("models.toml"))

import torch
from torch import nn

from tightfit.core import BudgetInfeasible, Lever, Plan, Trace, dumps
from tightfit.device.allocator import peaks
from tightfit.forecast import Adapters, Setup
from tightfit.forecast.setup import DTYPES, with_adapters
from tightfit.levers import exact_only
from tightfit.plan import Effort, every_block, lowest, plan, simulate
from tightfit.plan.account import has_caching_allocator
from tightfit.plan.simulate import allocations

GB, GIB = 10**9, 2**30
#: The model that is timed and compiled.
MODEL_OF_TIME = "llama-8x2048"
EFFORT = Effort(points=48, solver_seconds=0.4, proves=False)

NONE, EVERY_BLOCK = "none", "every-block"
#: The lowest peak by default levers that give the same bits; with the optimizer's step in backward beside them; the
#: lowest by all default ones (tiles too); and a plan for 60 % of the way from what lives throughout the step to its
#: unplanned peak.
LEAST, LEAST_STEPPED = "tightfit, least, exact", "tightfit, least, exact, step in backward"
LEAST_TILED, MIDDLE = "tightfit, least, tiles", "tightfit, 60%"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One step, and the ways to run it."""

    name: str
    setup: Setup
    modes: tuple[str, ...]
    published_bytes: Mapping[str, int] = field(default_factory=dict)

    @property
    def table(self) -> str:
        return self.name[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    title: str
    source: str
    assumed: tuple[str, ...]
    cases: tuple[Case, ...] = ()


def _public(name: str, modes: tuple[str, ...], published: Mapping[str, int], **more: Any) -> Case:
    return Case(name=name, setup=Setup(**more), modes=modes, published_bytes=published)


ALL = (NONE, EVERY_BLOCK, LEAST, LEAST_TILED)
#: torchtune's recipe has adapters on all but the key projection.
_TORCHTUNE = Adapters(targets=("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
_QUERY_AND_VALUE = Adapters(targets=("q_proj", "v_proj"))

TABLES: dict[str, Table] = {
    "A": Table(
        title="Llama-2-7B, 4 bits, LoRA of rank 8 on all linear layers, batch 1",
        source="https://github.com/hiyouga/LLaMA-Factory/wiki/Performance-comparison",
        assumed=(
            "The published figures are of an A100 40GB in whole GB, and do not say by which counter.",
            "LLaMA-Factory checkpoints every block, so its row is compared with `every-block`.",
            "AdamW by torch's foreach kernels; the adapters are float32, as PEFT makes them.",
        ),
        cases=tuple(
            _public(
                f"A-{seq}", ALL, {"FlashAttention-2": fa2 * GB, "Unsloth": unsloth * GB},
                model="llama-2-7b-long", method="qlora", rank=8, batch=1, seq=seq,
            )
            for seq, fa2, unsloth in (
                (1024, 6, 5), (2048, 7, 6), (4096, 9, 7), (8192, 12, 8), (16384, 19, 10), (32768, 32, 16),
            )
        ),
    ),
    "B": Table(
        title="Llama-2-7B, LoRA of rank 8 on query and value (4,194,304 parameters), 1,304 tokens",
        source="https://github.com/Lightning-AI/litgpt/blob/main/tutorials/resource-tables.md",
        assumed=(
            "The published figures are of an A100 40GB under PyTorch 2.1, in GB; nothing is checkpointed there.",
            "LitGPT has its own Llama and bf16 adapters. Here it is transformers' Llama with PEFT's float32 adapters.",
            "Double quantisation, so the published row to compare the 4-bit case with is nf4-dq.",
        ),
        cases=(
            _public(
                "B-lora", ALL, {"LitGPT": 21_300_000_000}, adapters=_QUERY_AND_VALUE,
                model="llama-2-7b", method="lora", rank=8, batch=1, seq=1304,
            ),
            _public(
                "B-nf4", ALL, {"LitGPT, nf4": 14_140_000_000, "LitGPT, nf4-dq": 13_840_000_000},
                adapters=_QUERY_AND_VALUE, model="llama-2-7b", method="qlora", rank=8, batch=1, seq=1304,
            ),
        ),
    ),
    "C": Table(
        title="Llama-3.2-3B, 2 x 4,096 packed tokens, bf16",
        source="https://github.com/pytorch/torchtune (README, memory and training speed)",
        assumed=(
            "The published figures are peak active memory on an A100. Each of its rows keeps what the rows before it "
            "switched on: 24.9 GiB is with torch.compile, a chunked loss and checkpointing.",
            "23.1 GiB is all of that with the optimizer's step in backward.",
            "Fused AdamW with bf16 state. LoRA is of rank 64 on all but the key projection, as in torchtune's recipe.",
            "A packed batch has an attention mask there; here the batch is two sequences without one.",
        ),
        cases=(
            _public(
                "C-full", (NONE, EVERY_BLOCK, LEAST, LEAST_STEPPED, LEAST_TILED),
                {"plain": int(60.0 * GIB), "checkpointed": int(24.9 * GIB), "step in backward": int(23.1 * GIB)},
                model="llama-3.2-3b", method="full", optimizer="adamw-fused", batch=2, seq=4096,
            ),
            _public(
                "C-lora", ALL, {"LoRA, all of it on": int(8.5 * GIB)}, adapters=_TORCHTUNE,
                model="llama-3.2-3b", method="lora", rank=64, optimizer="adamw-fused", batch=2, seq=4096,
            ),
            _public(
                "C-qlora", ALL, {"QLoRA, all of it on": int(4.6 * GIB)}, adapters=_TORCHTUNE,
                model="llama-3.2-3b", method="qlora", rank=64, optimizer="adamw-fused", batch=2, seq=4096,
            ),
        ),
    ),
    "D": Table(
        title="Llama-3.1-8B, QLoRA of rank 32 on all linear layers, batch 1: the longest context",
        source="https://unsloth.ai/blog/llama3-3",
        assumed=(
            "A card of n GB has n GiB, of which the driver takes 600 MiB and 2 % are kept free.",
            "Fused AdamW; the adapters are float32. The context is looked for to two parts in a hundred, from below.",
            "With tiles only four lengths were looked at for each card, so there may be room for more.",
            "`every-block` stands for Hugging Face with FlashAttention-2.",
        ),
    ),
    "S": Table(
        title="Small steps of several kinds, nothing published",
        source="",
        assumed=("The plan is for 60 % of the way from what lives throughout the step to its unplanned peak.",),
        cases=tuple(
            Case(
                name=f"S-{model}-{method}-{batch}x{seq}",
                setup=Setup(model=model, method=method, batch=batch, seq=seq, optimizer=optimizer),
                modes=(NONE, EVERY_BLOCK, MIDDLE),
            )
            for model, method, batch, seq, optimizer in (
                ("gpt2", "full", 4, 1024, "adamw"),
                ("gpt2-medium", "full", 4, 1024, "adamw-fused"),
                ("gpt2-xl", "lora", 2, 1024, "adamw"),
                ("llama-3.2-1b", "full", 1, 2048, "adamw"),
                ("llama-3.2-1b", "qlora", 2, 4096, "adamw"),
                ("qwen2.5-1.5b", "lora", 2, 2048, "adamw-fused"),
            )
        ),
    ),
}  # fmt: skip

#: Table D: the card's GiB, and the published tokens.
LONGEST = {
    12: {"Hugging Face + FlashAttention-2": 932, "Unsloth": 21_848},
    24: {"Hugging Face + FlashAttention-2": 5_789, "Unsloth": 78_475},
    80: {"Hugging Face + FlashAttention-2": 28_454, "Unsloth": 342_733},
}
LONGEST_SETUP = Setup(model="llama-3.1-8b-long", method="qlora", rank=32, batch=1, optimizer="adamw-fused")

#: What a dry run measures in place of the tables, and what it looks for in place of D: MiB and no published tokens.
TINY = {
    "S": (
        Case(
            name="S-tiny-gpt2", setup=Setup(model="tiny-gpt2", batch=2, seq=64, optimizer="adamw"),
            modes=(NONE, EVERY_BLOCK, MIDDLE),
        ),
    ),
    "A": (
        Case(
            name="A-tiny", setup=Setup(model="tiny-llama", method="qlora", rank=2, batch=1, seq=64),
            modes=(EVERY_BLOCK, LEAST),
        ),
    ),
    "B": (
        Case(
            name="B-tiny",
            setup=Setup(model="tiny-llama", method="lora", rank=2, batch=2, seq=64, adapters=_QUERY_AND_VALUE),
            modes=(NONE, LEAST, LEAST_TILED),
        ),
    ),
    "C": (
        Case(
            name="C-tiny", setup=Setup(model="tiny-llama", optimizer="adamw-fused", batch=2, seq=64),
            modes=(NONE, EVERY_BLOCK, LEAST_STEPPED),
        ),
    ),
}  # fmt: skip
TINY_LONGEST_SETUP = Setup(model="tiny-llama", method="lora", rank=2, batch=1, optimizer="adamw-fused")


def step_of(case: Case, device: torch.device) -> tuple[Any, dict[str, torch.Tensor], torch.optim.Optimizer]:
    """The case's model with random weights, a batch and the optimizer, on `device`."""
    from tightfit.integrations.transformers import load_model, random_batch

    setup = case.setup
    weights, compute = DTYPES[setup.dtype]
    if setup.method == "qlora":
        model = _packed(setup.model, weights, compute or weights, device)
    else:
        model, _ = load_model(setup.model, dtype=weights, device=device)
    if setup.method != "full":
        model = with_adapters(model, setup, device)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # PEFT makes them zero, and then half of the gradients are zero whatever goes wrong
                nn.init.normal_(parameter, std=0.02)
    return model, random_batch(model, setup.batch, setup.seq), optimizer_of(model, setup.optimizer)


@contextlib.contextmanager
def _linear_on_meta() -> Iterator[None]:
    """Linear layers that are made inside have no weights yet."""
    original = nn.Linear.__init__

    def on_meta(self: nn.Linear, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "device": "meta"})

    nn.Linear.__init__ = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Linear.__init__ = original  # type: ignore[method-assign]


def _packed(name: str, dtype: torch.dtype, compute: torch.dtype, device: torch.device) -> Any:
    """The model in 4 bits: every linear layer is given random weights and packed before the next one has any.

    A card that holds the 4-bit model need not hold the 16-bit one, and the allocator's segments end up as they do where
    a checkpoint is loaded layer by layer.
    """
    from transformers import AutoModelForCausalLM

    from tightfit.integrations.bitsandbytes import quantise
    from tightfit.integrations.transformers import config_named

    with _linear_on_meta(), torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config_named(name)), dtype=dtype)
    model.train()
    head = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is not nn.Linear or not child.weight.is_meta:
                continue
            drawn = torch.empty(child.weight.shape, dtype=dtype, device=device).normal_(std=0.02)
            child.weight = nn.Parameter(drawn)
            if child.bias is not None:
                child.bias = nn.Parameter(torch.zeros(child.bias.shape, dtype=dtype, device=device))
            del drawn
            if child is not head:
                setattr(module, name, quantise(nn.ModuleList([child]), compute)[0])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.is_loaded_in_4bit = True  # what PEFT asks
    return model


def optimizer_of(model: nn.Module, name: str) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-5, fused=True if name == "adamw-fused" else None)


def plan_of(trace: Trace, mode: str) -> Plan | None:
    """The plan that `mode` stands for; None for the step as it is."""
    if mode == NONE:
        return None
    if mode == EVERY_BLOCK:
        return every_block(trace, effort=EFFORT)
    if mode in (LEAST, LEAST_STEPPED, LEAST_TILED):
        levers = None if mode == LEAST_TILED else exact_only(None)
        if mode == LEAST_STEPPED and levers is not None:
            # either steps the optimizer in its own way; the one that was asked for stays
            levers = levers - {Lever.OPTIMIZER_CHUNKS} | {Lever.STEP_IN_BACKWARD}
        return lowest(trace, effort=EFFORT, levers=levers)
    fixed_bytes, top_bytes = sum(trace.static_bytes.values()), simulate(trace).peak_bytes
    try:
        return plan(trace, fixed_bytes + (top_bytes - fixed_bytes) * 6 // 10, effort=EFFORT, exact=True)
    except BudgetInfeasible:
        return lowest(trace, effort=EFFORT, levers=exact_only(None))


#: The registered plans themselves, so that what was forecast is what runs: one member for each case and mode.
PLANS = Path(__file__).parents[1] / "results" / "gpu_plans.zip"


def kept_plans() -> dict[tuple[str, str], str]:
    """The registered plans as text, by case and mode."""
    if not PLANS.exists():
        return {}
    with zipfile.ZipFile(PLANS) as archive:
        names = [tuple(name.removesuffix(".json").split("/", 1)) for name in archive.namelist()]
        return {(case, mode): archive.read(f"{case}/{mode}.json").decode() for case, mode in names}


def keep_plans(made: Mapping[tuple[str, str], Plan]) -> None:
    """Put `made` among the registered plans. The time stamps are fixed, so equal plans give an equal file."""
    texts = kept_plans() | {key: dumps(each) for key, each in made.items()}
    temporary = PLANS.with_suffix(".zip.part")
    with zipfile.ZipFile(temporary, "w") as archive:
        for (case, mode), text in sorted(texts.items()):
            member = zipfile.ZipInfo(f"{case}/{mode}.json", (1980, 1, 1, 0, 0, 0))
            archive.writestr(member, text, zipfile.ZIP_LZMA)
    temporary.replace(PLANS)


def forecast_of(trace: Trace, made: Plan | None, room_bytes: int | None = None) -> dict[str, Any]:
    """What is registered of a way to run a step. `room_bytes`: the cap that the kit sets on the card's allocator; where
    it meets that, it gives free segments back first."""
    line = simulate(trace, made)
    found: dict[str, Any] = {"peak_bytes": line.peak_bytes, "owner": line.peak_owner}
    if has_caching_allocator(trace):
        found["allocated_bytes"], found["reserved_bytes"] = peaks(
            *allocations(trace, made), limit_bytes=room_bytes, expandable=trace.expandable_segments
        )
    if made is not None:
        found |= {
            "exact": made.exact, "replays": made.replays, "budget_bytes": made.budget_bytes,
            "recompute_of_forward": round(made.recompute_flops / made.forward_flops, 4) if made.forward_flops else 0.0,
        }  # fmt: skip
    return found


def described(case: Case) -> dict[str, Any]:
    setup = case.setup
    return {
        "case": case.name, "model": setup.model, "method": setup.method, "rank": setup.rank, "batch": setup.batch,
        "seq": setup.seq, "dtype": setup.dtype, "optimizer": setup.optimizer,
        "targets": list(setup.adapters.targets or ()), "published_bytes": dict(case.published_bytes),
    }  # fmt: skip


def longer(setup: Setup, seq: int) -> Setup:
    return dataclasses.replace(setup, seq=seq)
