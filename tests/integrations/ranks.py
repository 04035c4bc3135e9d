"""What each process of a distributed test does: `torchrun --nproc-per-node N ranks.py OUT CASE ...`.

Every case leaves what this rank saw in `OUT/CASE.RANK.json`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from tests.by_the_book import seconds_by_the_book
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import tightfit
from tightfit.core import TightfitError
from tightfit.fitting import planning
from tightfit.integrations.peft import add_lora
from tightfit.step.parallel import local_of
from tightfit.verify.peak import PeakMeter, static_bytes

STEPS = 20
TOKENS = 64


def llama(method: str = "full") -> Any:
    """Small, with dropout; made from its config alone, so that a forecast can be made of the same."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(config()).train()
    return model if method == "full" else add_lora(model, rank=4, dropout=0.1)


def config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=250, attention_dropout=0.1, use_cache=False,
    )  # fmt: skip


def spread(case: str) -> nn.Module:
    """The model of a case, wrapped as its name says."""
    model = llama("lora" if "lora" in case else "full")
    if case.startswith("ddp"):
        return DistributedDataParallel(model, gradient_as_bucket_view="views" in case)
    how: dict[str, Any] = {"reshard_after_forward": "whole" not in case}
    if "bf16" in case:
        how["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if "mesh" in case:  # two groups of replicas
        how["mesh"] = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicas", "shards"))
    for module in model.modules():
        if type(module).__name__ == "LlamaDecoderLayer":
            fully_shard(module, **how)
    fully_shard(model, **how)
    return model


def batch(step: int, tokens: int = TOKENS) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    ids = torch.randint(0, 250, (2, tokens), generator=generator)
    return {"input_ids": ids, "labels": ids}


def synchronise(model: nn.Module, on: bool) -> None:
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = on
    else:
        model.set_requires_gradient_sync(on)  # type: ignore[operator]


def trained(model: nn.Module, accumulates: bool, steps: int = STEPS) -> list[Any]:
    """Losses and this rank's gradients of every step, with an optimizer that uses them."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    torch.manual_seed(7 + dist.get_rank())
    seen: list[Any] = []
    for step in range(steps):
        reduces = not accumulates or step % 2 == 1
        if accumulates:
            synchronise(model, reduces)
        loss = model(**batch(step)).loss
        loss.backward()
        seen.append(loss.item())
        if reduces:
            seen += [None if p.grad is None else local_of(p.grad).clone() for p in model.parameters()]
            optimizer.step()
            optimizer.zero_grad()
    return seen


def same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
        for a, b in zip(one, other, strict=True)
    )


def step_peak_bytes(model: nn.Module) -> int:
    """The most that one of ten steps held: gloo's threads let go of a buffer a little later now and then."""
    found = []
    for _ in range(10):
        for parameter in model.parameters():
            parameter.grad = None
        given = batch(0)
        before = static_bytes(model, None, given)
        with PeakMeter("cpu") as meter:
            model(**given).loss.backward()
        found.append(before + meter.rise_bytes)
    for parameter in model.parameters():
        parameter.grad = None
    return min(found)


def twenty_steps(case: str) -> dict[str, Any]:
    accumulates = "accumulated" in case
    reference = trained(spread(case), accumulates)
    model = spread(case)
    applied = tightfit.fit(model, batch(0), "70%")
    predicted = applied.plan.peak_bytes
    mine = trained(model, accumulates)
    stats = applied.stats()
    synchronise(model, True)
    measured = step_peak_bytes(model) if not accumulates else None
    applied.remove()
    return {
        "same": same(reference, mine), "replays": stats.replays, "fallbacks": stats.fallbacks,
        "predicted": predicted, "measured": measured, "budget": applied.plan.budget_bytes,
        "decisions": applied.plan.decisions,
        "untouched": all(not hasattr(m.forward, "__tightfit__") for m in model.modules()),
    }  # fmt: skip


def proven(case: str) -> dict[str, Any]:
    model = spread(case.removeprefix("proven-"))
    given = batch(0)
    plan = tightfit.fit(model, given, "75%")
    plan.remove()
    proof = tightfit.verify(model, given, plan.plan)
    return {"passed": proof.passed, "checks": {check.name: check.measured for check in proof.checks}}


def sharded_inside(_: str) -> dict[str, Any]:
    """Parts of a block are sharded on their own: the block is kept whole, its parts can be units."""
    model = llama()
    parts = [
        f"model.layers.{i}.{part}" for i in range(len(model.model.layers)) for part in ("mlp", "self_attn")
    ]  # fmt: skip
    for part in parts:
        fully_shard(model.get_submodule(part))
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    found = refused(lambda: tightfit.fit(model, batch(0), "60%"))
    pinned = {unit.pinned for unit in tightfit.trace(model, batch(0), tiles=False).units}
    applied = tightfit.fit(model, batch(0), "80%", units=parts, levers="recompute")
    mine = trained(model, False, steps=3)
    stats = applied.stats()
    return {
        **found, "pinned": sorted(pinned), "replays": stats.replays, "fallbacks": stats.fallbacks, "losses": mine[0]
    }  # fmt: skip


def longer(case: str) -> dict[str, Any]:
    """One rank meets a longer batch: all plan anew, for the same bytes."""
    model = spread(case.removeprefix("longer-"))
    applied = tightfit.fit(model, batch(0), "75%")
    before = applied.plan.decisions
    length = TOKENS + 32 * (dist.get_rank() == 1)
    model(**batch(0, length)).loss.backward()
    return {
        "replanned": applied.plan.decisions != before, "decisions": applied.plan.decisions,
        "peak": applied.plan.peak_bytes, "budget": applied.plan.budget_bytes,
    }  # fmt: skip


def other_budgets(_: str) -> dict[str, Any]:
    """Each rank asks for another size: the one plan holds the least."""
    model = spread("fsdp")
    needs = tightfit.simulate(tightfit.trace(model, batch(0), tiles=False)).peak_bytes
    asked = int(needs * (0.9 if dist.get_rank() else 0.75))
    applied = tightfit.fit(model, batch(0), asked, levers="recompute")
    return {"asked": asked, "budget": applied.plan.budget_bytes, "peak": applied.plan.peak_bytes}


def smaller_share(_: str) -> dict[str, Any]:
    """Rank 1 may take less of its card than the budget that all ask for."""
    model = spread("ddp")
    needs = tightfit.simulate(tightfit.trace(model, batch(0), tiles=False)).peak_bytes
    share = int(needs * 0.8) if dist.get_rank() else None
    with warnings.catch_warnings(record=True) as said, mock.patch.object(planning, "share_of_device", lambda _: share):
        warnings.simplefilter("always")
        applied = tightfit.fit(model, batch(0), "95%", levers="recompute")
    lines = [str(line.message) for line in said if "of its card" in str(line.message)]
    return {"needs": needs, "budget": applied.plan.budget_bytes, "peak": applied.plan.peak_bytes, "said": lines}


def levers_beside(_: str) -> dict[str, Any]:
    """Levers of the units are used, and those that need one process are told."""
    model = spread("ddp")
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        applied = tightfit.fit(model, batch(0), "85%", optimizer=optimizer, beside="offload,step_in_backward")
    lines = [str(line.message) for line in said if "asked for" in str(line.message)]
    return {"offloaded": applied.plan.offloaded_bytes, "settings": dict(applied.plan.settings), "said": lines}


def uneven(_: str) -> dict[str, Any]:
    """Ranks that have different numbers of micro-batches under `no_sync`, of other lengths in turn."""

    def run(fitted: bool) -> list[Any]:
        model = spread("ddp")
        if fitted:
            tightfit.fit(model, batch(0), "80%")
        torch.manual_seed(dist.get_rank())
        seen: list[Any] = []
        for step in range(3):
            with model.no_sync():  # type: ignore[operator]
                for micro in range(1 + dist.get_rank()):
                    model(**batch(10 * step + micro)).loss.backward()
            length = TOKENS + 16 * ((step + dist.get_rank()) % 2)
            model(**batch(step, length)).loss.backward()
            seen += [p.grad.clone() for p in model.parameters() if p.grad is not None]
            model.zero_grad()
        return seen

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {"same": same(run(False), run(True))}


def fails(_: str) -> dict[str, Any]:
    """One rank's own error is what it raises, and what the others are told."""

    def loss(model: nn.Module, given: Any) -> torch.Tensor:
        if dist.get_rank() == 1:
            raise ValueError("my own error")
        value: torch.Tensor = model(**given).loss
        return value

    model = spread("ddp")
    return refused(lambda: tightfit.fit(model, batch(0), "80%", loss=loss))


def refused(run: Callable[[], Any]) -> dict[str, Any]:
    try:
        run()
    except TightfitError as error:
        return {"error": type(error).__name__, "says": str(error)}
    return {"error": None}


def another_plan(_: str) -> dict[str, Any]:
    model = spread("fsdp")
    shares = ("75%", "60%")
    plan = tightfit.plan(tightfit.trace(model, batch(0), tiles=False), shares[dist.get_rank() % 2])
    found = refused(lambda: tightfit.apply(model, plan))
    return {**found, "untouched": all(not hasattr(m.forward, "__tightfit__") for m in model.modules())}


def given_plan(_: str) -> dict[str, Any]:
    """A file that one process made alone is the plan of all; where it is none for one rank, all are told."""
    file = Path(sys.argv[1]) / "plan.json"
    if dist.get_rank() == 0:
        tightfit.plan(tightfit.trace(llama("lora"), batch(0), tiles=False), "70%", levers="recompute").save(file)
    dist.barrier()
    alone = tightfit.Plan.load(file)
    reference = trained(spread("ddp-lora"), accumulates=False, steps=2)
    model = spread("ddp-lora")
    applied = tightfit.fit(model, batch(0), "64MiB", plan=file)
    mine = trained(model, accumulates=False, steps=2)
    found = {"same": same(reference, mine), "replays": applied.stats().replays, "planned": alone.replays}
    applied.remove()
    long = batch(0, 2 * TOKENS) if dist.get_rank() == 1 else batch(0)
    return {**found, **refused(lambda: tightfit.fit(model, long, applied.plan.peak_bytes, plan=alone))}


def too_little(_: str) -> dict[str, Any]:
    model = spread("fsdp")
    return refused(lambda: tightfit.fit(model, batch(0), 1000, levers="recompute"))


def late(_: str) -> dict[str, Any]:
    """The last rank does not come."""
    model = spread("ddp")
    applied = tightfit.fit(model, batch(0), "75%")
    applied.remove()
    if dist.get_rank() == dist.get_world_size() - 1:
        time.sleep(6)
        return {}
    os.environ["TIGHTFIT_TIMEOUT_SECONDS"] = "2"
    return refused(lambda: tightfit.apply(model, applied.plan))


def waiting(_: str) -> dict[str, Any]:
    """Gradients that wait to be reduced are not lost to a trace."""
    model = spread("fsdp")
    model(**batch(0)).loss.backward()
    expected = [local_of(p.grad).clone() for p in model.parameters()]  # type: ignore[arg-type]
    for parameter in model.parameters():
        parameter.grad = None
    synchronise(model, False)
    model(**batch(0)).loss.backward()
    found = refused(lambda: tightfit.trace(model, batch(0), tiles=False))
    synchronise(model, True)
    model(**batch(0)).loss.backward()
    twice = [local_of(p.grad) for p in model.parameters()]  # type: ignore[arg-type]
    return {**found, "kept": not any(torch.equal(a, b) for a, b in zip(expected, twice, strict=True))}


def trainer(case: str) -> dict[str, Any]:
    """The Trainer's own distributed training, with and without the callback."""
    import contextlib
    import tempfile

    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    from tightfit.integrations.trainer import TightfitCallback

    rows = [{"input_ids": [(7 * i + 3 * j) % 250 for j in range(48)]} for i in range(32)]
    data = Dataset.from_list([{**row, "labels": row["input_ids"]} for row in rows])

    def run(callback: Any) -> tuple[list[float], list[torch.Tensor]]:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
            args = TrainingArguments(
                folder, max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1,
                report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, seed=3,
            )  # fmt: skip
            made = Trainer(llama("lora" if "lora" in case else "full"), args, train_dataset=data)
            if callback is not None:
                made.add_callback(callback)
            made.train()
            weights = [local_of(p.detach()).clone() for p in made.model.parameters()]
            return [entry["loss"] for entry in made.state.log_history if "loss" in entry], weights

    reference = run(None)
    callback = TightfitCallback("75%")
    mine = run(callback)
    assert callback.proof is not None and callback.plan is not None
    return {
        "losses": reference[0] == mine[0], "weights": same(list(reference[1]), list(mine[1])),
        "proof": callback.proof.passed, "said": callback.said, "peaks": max(callback.peaks),
        "budget": callback.plan.budget_bytes,
    }  # fmt: skip


def killed(case: str) -> dict[str, Any]:
    """Six steps of the Trainer that saves every second one; `killed-die`: the last rank is killed in the fifth."""
    from datasets import Dataset
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from tightfit.integrations.trainer import TightfitCallback

    what, folder = case.split("-")[1], Path(sys.argv[1]) / ("whole" if case.endswith("whole") else "broken")
    rows = [{"input_ids": [(7 * i + 3 * j) % 250 for j in range(48)]} for i in range(32)]

    class Dies(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if what == "die" and state.global_step == 4 and dist.get_rank() == dist.get_world_size() - 1:
                os.kill(os.getpid(), signal.SIGKILL)

    args = TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=2, logging_steps=1, report_to=[], save_steps=2,
        use_cpu=True, disable_tqdm=True, seed=3,
    )  # fmt: skip
    data = Dataset.from_list([{**row, "labels": row["input_ids"]} for row in rows])
    callback = TightfitCallback("75%")
    made = Trainer(llama(), args, train_dataset=data, callbacks=[callback, Dies()])
    made.train(resume_from_checkpoint=what == "resume")
    torch.save([p.detach() for p in made.model.parameters()], folder / f"weights.{dist.get_rank()}.pt")
    return {"losses": [entry["loss"] for entry in made.state.log_history if "loss" in entry], "said": callback.said}


CASES: dict[str, Callable[[str], dict[str, Any]]] = {
    "proven": proven, "longer": longer, "another": another_plan, "toolittle": too_little, "late": late,
    "waiting": waiting, "trainer": trainer, "inside": sharded_inside, "killed": killed, "budgets": other_budgets,
    "share": smaller_share, "beside": levers_beside,
    "uneven": uneven, "fails": fails, "given": given_plan,
}  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
    with seconds_by_the_book(dist.get_rank()):
        for case in sys.argv[2:]:
            found = CASES.get(case.partition("-")[0], twenty_steps)(case)
            (folder / f"{case}.{dist.get_rank()}.json").write_text(json.dumps(found))
            dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
