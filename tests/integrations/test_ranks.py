"""Several processes on gloo: DDP and FSDP2 under a plan are the same run, agree on one plan, and fail together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

import tightfit
from tightfit.core import Category, Unsupported
from tightfit.integrations.fsdp import shard_bytes, sharded
from tightfit.plan import lowest

PROGRAM = Path(__file__).with_name("ranks.py")
#: Steps of FSDP2 can be taken back since torch 2.13, and a plan needs that.
FSDP2 = hasattr(FSDPModule, "reset_iter_state")
#: What runs in the fast suite: each kind of fault has a case. The slow one has the other ways to share a step.
TWENTY_STEPS = (*(("fsdp",) if FSDP2 else ()), "ddp-lora")
TWENTY_STEPS_MORE = ("fsdp-whole", "fsdp-bf16-lora", "fsdp-accumulated", "ddp-views", "ddp-accumulated")
OTHERS = (
    "proven-fsdp", "another", "toolittle", "waiting", "inside", "fails", "late",
)  # fmt: skip
FOUR = ("fsdp-lora", "fsdp-mesh", "ddp", "another", "late")
slow = pytest.mark.slow
needs_fsdp2 = pytest.mark.skipif(not FSDP2, reason="torch before 2.13 cannot take back a step of FSDP2")


def launched(
    folder: Path, world: int, cases: tuple[str, ...], *, dies: bool = False
) -> dict[str, list[dict[str, Any]]]:
    """What each rank says of each case."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(PROGRAM.parents[2]), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), str(PROGRAM),
            str(folder), *cases,
        ],
        capture_output=True, text=True, check=False, env=environment, timeout=900,
    )  # fmt: skip
    if dies:
        assert done.returncode != 0
        assert "Signal 9 (SIGKILL)" in done.stderr, done.stderr[-4000:]  # torchrun names the rank and its end
        return {}
    assert done.returncode == 0, done.stderr[-4000:]
    return {case: [json.loads((folder / f"{case}.{rank}.json").read_text()) for rank in range(world)] for case in cases}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return launched(
        tmp_path_factory.mktemp("two"), 2, (*TWENTY_STEPS, "given", "share", "beside", *(OTHERS if FSDP2 else ()))
    )


@pytest.fixture(scope="module")
def two_more(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return launched(
        tmp_path_factory.mktemp("more"),
        2,
        (*TWENTY_STEPS_MORE, "longer-fsdp", "longer-ddp", "budgets", "trainer-ddp", "uneven"),
    )


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return launched(tmp_path_factory.mktemp("four"), 4, FOUR)


def is_the_same_run(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["same"], "losses or gradients differ from those of the same run without a plan"
        assert rank["replays"] == 60 and rank["fallbacks"] == 0  # 3 units, 20 steps
        assert rank["predicted"] <= rank["budget"]
        if rank["measured"] is not None:
            assert abs(rank["measured"] / rank["predicted"] - 1) <= 0.02
        assert rank["untouched"]
    assert len({rank["decisions"] for rank in found}) == 1


@pytest.mark.parametrize("case", TWENTY_STEPS)
def test_twenty_steps_of_two_ranks_are_bit_for_bit_those_without(two: dict[str, Any], case: str) -> None:
    is_the_same_run(two[case])


@slow
@needs_fsdp2
@pytest.mark.parametrize("case", TWENTY_STEPS_MORE)
def test_twenty_steps_of_the_other_ways_are_too(two_more: dict[str, Any], case: str) -> None:
    is_the_same_run(two_more[case])


@slow
@needs_fsdp2
@pytest.mark.parametrize("case", ("fsdp-lora", "fsdp-mesh", "ddp"))
def test_twenty_steps_of_four_ranks_are_bit_for_bit_those_without(four: dict[str, Any], case: str) -> None:
    is_the_same_run(four[case])


@needs_fsdp2
def test_verify_proves_a_sharded_step(two: dict[str, Any]) -> None:
    for rank in two["proven-fsdp"]:
        assert rank["passed"], rank["checks"]
        assert rank["checks"]["gradients"] == "30 identical"


@slow
@needs_fsdp2
@pytest.mark.parametrize("case", ["longer-fsdp", "longer-ddp"])
def test_a_longer_batch_on_one_rank_has_all_plan_anew(two_more: dict[str, Any], case: str) -> None:
    first, second = two_more[case]
    assert first["replanned"] and second["replanned"]
    assert first["decisions"] == second["decisions"]
    assert first["peak"] < second["peak"] <= second["budget"] == first["budget"]


@needs_fsdp2
def test_a_rank_with_another_plan_stops_all_before_the_first_step(two: dict[str, Any]) -> None:
    stops_all(two["another"])


@slow
@needs_fsdp2
def test_among_four_ranks_too(four: dict[str, Any]) -> None:
    stops_all(four["another"])
    for rank in four["late"][:3]:
        assert "rank 3 did not come to 'apply' within 2 s" in rank["says"]


def stops_all(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["error"] == "PlanMismatch" and "rank 1 is about to run another plan" in rank["says"]
        assert rank["untouched"]


def test_a_plan_that_is_given_is_that_of_all_ranks_or_of_none(two: dict[str, Any]) -> None:
    for rank, found in enumerate(two["given"]):
        assert found["same"] and found["replays"] == 2 * found["planned"] > 0
        assert found["error"] == "PlanMismatch"
        who = "the plan that was given takes" if rank == 1 else "the plan that was given is none for rank 1"
        assert found["says"].startswith(who) and "and may take" in found["says"], found["says"]


@slow
@needs_fsdp2
def test_the_least_of_the_ranks_budgets_holds(two_more: dict[str, Any]) -> None:
    least = min(rank["asked"] for rank in two_more["budgets"])
    for rank in two_more["budgets"]:
        assert rank["peak"] <= rank["budget"] == least


def test_levers_named_beside_the_default_are_used_or_told(two: dict[str, Any]) -> None:
    for rank in two["beside"]:
        assert rank["offloaded"] > 0 and not rank["settings"]
        (line,) = rank["said"]
        assert line.startswith("step_in_backward was asked for") and "several processes share the step" in line


def test_the_smallest_share_of_a_card_holds_on_all_ranks(two: dict[str, Any]) -> None:
    for rank in two["share"]:
        assert rank["peak"] <= rank["budget"] == int(rank["needs"] * 0.8)
        assert len(rank["said"]) == 1 and "and rank 1 may take" in rank["said"][0]


@slow
@needs_fsdp2
def test_ranks_with_other_numbers_of_micro_batches_do_not_wait_for_each_other(two_more: dict[str, Any]) -> None:
    assert all(rank["same"] for rank in two_more["uneven"])


@needs_fsdp2
def test_the_error_of_one_rank_is_told_to_all(two: dict[str, Any]) -> None:
    assert "my own error" in two["fails"][1]["says"] and two["fails"][1]["error"] == "InvalidInput"
    assert two["fails"][0]["says"].startswith("rank 1 cannot record its step: InvalidInput")


@needs_fsdp2
def test_a_budget_that_no_rank_can_hold_is_refused_on_all(two: dict[str, Any]) -> None:
    assert {rank["error"] for rank in two["toolittle"]} == {"BudgetInfeasible"}
    assert len({rank["says"] for rank in two["toolittle"]}) == 1


@needs_fsdp2
def test_a_rank_that_does_not_come_is_named(two: dict[str, Any]) -> None:
    assert "rank 1 did not come to 'apply' within 2 s" in two["late"][0]["says"]


@needs_fsdp2
def test_gradients_that_wait_to_be_reduced_are_not_lost(two: dict[str, Any]) -> None:
    for rank in two["waiting"]:
        assert rank["error"] == "Unsupported" and "set_requires_gradient_sync" in rank["says"]
        assert rank["kept"]


@needs_fsdp2
def test_a_block_whose_parts_are_sharded_on_their_own_is_kept_whole(two: dict[str, Any]) -> None:
    for rank in two["inside"]:
        assert rank["error"] == "BudgetInfeasible"
        assert all("other processes take part in it" in reason for reason in rank["pinned"])
        assert rank["replays"] and not rank["fallbacks"]  # the parts, as units


@slow
@needs_fsdp2
def test_the_trainer_is_the_same_under_ddp(two_more: dict[str, Any]) -> None:
    for rank in two_more["trainer-ddp"]:
        assert rank["losses"] and rank["weights"] and rank["proof"]
        assert rank["peaks"] <= rank["budget"] * 1.005


# ------------------------------------------------------------------------------------------- without ranks


def pretended(world: int, **how: Any) -> tightfit.Trace:
    sys.path.insert(0, str(PROGRAM.parent))
    try:
        from ranks import TOKENS, config  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(config()).train()
    ids = torch.zeros(2, TOKENS, dtype=torch.long)
    with sharded(model, world, **how) as twin:
        recorded = tightfit.trace(twin, {"input_ids": ids, "labels": ids}, fake=True, tiles=False)
    assert not torch.distributed.is_initialized()
    assert recorded.static_bytes[Category.PARAMETERS.value] == sum(shard_bytes(p, world) for p in model.parameters())
    return recorded


@needs_fsdp2
def test_a_forecast_by_fake_collectives_is_what_ranks_measure(two: dict[str, Any]) -> None:
    is_what_ranks_measure(pretended(2), two["fsdp"])


@slow
@needs_fsdp2
def test_a_forecast_of_weights_that_stay_is_what_ranks_measure(two_more: dict[str, Any]) -> None:
    is_what_ranks_measure(pretended(2, reshards=False), two_more["fsdp-whole"])


def is_what_ranks_measure(recorded: tightfit.Trace, ranks: list[dict[str, Any]]) -> None:
    plan = tightfit.plan(recorded, ranks[0]["budget"])
    for rank in ranks:
        # two plans for one budget, one by measured seconds and one by estimated ones: their peaks are near it
        assert abs(plan.peak_bytes / rank["measured"] - 1) <= 0.02


@needs_fsdp2
def test_more_ranks_hold_less_and_take_no_longer_to_plan() -> None:
    few, many = pretended(2), pretended(32)
    peaks = [tightfit.simulate(each).peak_bytes for each in (few, many)]
    assert peaks[1] < peaks[0]
    assert len(few.ops) == len(many.ops) and len(few.events) == len(many.events)


@slow
@needs_fsdp2
def test_weights_that_are_given_back_are_not_swept_through() -> None:
    recorded = pretended(2)
    assert recorded.resharded
    assert not lowest(recorded).advances
    assert not pretended(2, reshards=False).resharded


@pytest.mark.skipif(FSDP2, reason="this torch can")
def test_where_fsdp2_cannot_be_planned_one_line_says_which_torch_can() -> None:
    with pytest.raises(Unsupported, match=r"use torch 2\.13 or later, or DDP"):
        pretended(2)


def test_four_bit_weights_are_not_sharded() -> None:
    from tightfit.forecast import Setup

    with pytest.raises(Unsupported, match="4-bit weights cannot be sharded"):
        Setup(model="llama-2-7b", method="qlora", strategy="fsdp2", world_size=8).checked()


@pytest.mark.slow
def test_a_killed_rank_leaves_what_the_others_go_on_from(tmp_path: Path) -> None:
    whole = launched(tmp_path, 2, ("killed-never-whole",))["killed-never-whole"]
    launched(tmp_path, 2, ("killed-die",), dies=True)
    assert (tmp_path / "broken" / "checkpoint-4" / "trainer_state.json").is_file()
    resumed = launched(tmp_path, 2, ("killed-resume",))["killed-resume"]
    for rank in range(2):
        assert resumed[rank]["losses"] == whole[rank]["losses"]
        one, other = (torch.load(tmp_path / name / f"weights.{rank}.pt") for name in ("whole", "broken"))
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
