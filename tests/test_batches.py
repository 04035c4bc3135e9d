"""`--batch auto` on the command line: forecast by check, measured by measure, named in a file for train."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tightfit import forecast
from tightfit.cli.program import main
from tightfit.core import Device, Phase
from tightfit.forecast import Setup
from tightfit.forecast.room import CONTEXT_BYTES, MARGIN
from tightfit.forecast.search import QUICK, fitted
from tightfit.plan.micro_batches import sizes_of

GLOBAL = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    shape = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 2000,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(shape))
    return str(folder)


def card(room_bytes: int) -> Device:
    return forecast.device_asked(f"{int(room_bytes * (1 + MARGIN)) + CONTEXT_BYTES}")


# ------------------------------------------------------------------------------------------------ check


def asked_of_check(model: str, device: Device, capsys: pytest.CaptureFixture[str], *asked: str) -> tuple[int, Any]:
    given = ("--gpu", device.name, "--seq", "512", "--no-search", "--json", *asked)
    return main(["check", model, *given]), json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_check_cuts_the_global_batch_as_plans_of_each_size_say(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    device = card(56 * 2**20)
    status, answer = asked_of_check(model, device, capsys, "--batch", "auto", "--global-batch", str(GLOBAL))
    chosen = answer["micro_batches"]
    seconds = {}
    for size in sizes_of(GLOBAL):
        recorded = forecast.trace_for(Setup(model=model, seq=512, batch=size, accumulate=size < GLOBAL), device)
        made = fitted(recorded, forecast.usable_bytes(device), QUICK)
        if made is not None:
            at_its_end = sum(op.seconds for op in recorded.ops if op.phase is Phase.OPTIMIZER)
            seconds[size] = GLOBAL // size * (made.step_seconds - at_its_end) + at_its_end
    assert 0 < len(seconds) < len(sizes_of(GLOBAL)), "the card tells the sizes apart"
    assert status == 0 and answer["fits"] and chosen["largest"] == max(seconds)
    assert answer["batch"] == chosen["size"] == min(seconds, key=lambda size: seconds[size])
    assert chosen["accumulation"] == GLOBAL // chosen["size"]
    assert chosen["seconds"] == pytest.approx(seconds[chosen["size"]])
    assert any("fit, measure and train do" in note for note in answer["notes"])
    gradients_bytes = answer["modes"][-1]["by_category"]["gradients"]
    assert gradients_bytes > 0, "a micro-batch finds the gradients of those before it"


def test_check_of_a_batch_says_nothing_of_micro_batches(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, answer = asked_of_check(model, card(2**30), capsys, "--batch", "2")
    assert status == 0 and "micro_batches" not in answer and answer["batch"] == 2


@pytest.mark.slow
def test_check_says_that_not_even_single_sequences_fit(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    auto = ("--batch", "auto", "--global-batch", "4")
    status, answer = asked_of_check(model, card(22 * 2**20), capsys, *auto)
    assert status == 1 and not answer["fits"] and "micro_batches" not in answer and answer["batch"] == 1


def test_check_shows_the_choice_in_one_line(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--gpu", card(2**30).name, "--seq", "32", "--no-search", "--batch", "auto", "--global-batch", "2")
    assert main(["check", model, *given]) == 0
    assert "global batch: the global batch of 2 runs in one piece: all of it fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--global-batch", "8"), "--global-batch is what --batch auto cuts"),
        (("--batch", "4", "--global-batch", "8"), "--global-batch is what --batch auto cuts"),
        (("--batch", "auto"), "say how large it is (--global-batch)"),
        (("--batch", "auto", "--global-batch", "0"), "--global-batch of at least 1, not 0"),
        (("--batch", "auto", "--global-batch", "many"), "unable to parse string"),
        (("--batch", "several"), "a number of sequences or auto, not 'several'"),
        (("--batch", "auto", "--global-batch", "8", "--gpu", "all"), "give --batch a number, or one --gpu"),
        (("--levers", "streams"), "unknown lever 'streams'"),
        (("--batch", "auto", "--global-batch", "8", "--accumulate"), "leave --accumulate out"),
        (("--batch", "auto", "--global-batch", "8", "--world-size", "2", "--strategy", "ddp"), "2 ranks were asked"),
        (("--batch", "auto", "--global-batch", "99999999"), "--global-batch of 1 to 16777216 sequences"),
    ],
)
def test_check_refuses_what_cannot_be_meant(
    asked: tuple[str, ...], said: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", model, "--seq", "32", *asked]) == 2
    out, err = capsys.readouterr()
    assert not out and said in " ".join(err.split())


# ---------------------------------------------------------------------------------------------- measure


def measured(model: str, capsys: pytest.CaptureFixture[str], *asked: str) -> tuple[int, Any]:
    status = main(["measure", model, "--seq", "256", "--repeats", "1", "--json", *asked])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_measure_runs_the_micro_batches_and_holds_the_budget(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, answer = measured(model, capsys, "--batch", "auto", "--global-batch", "4", "--budget", "35%")
    chosen, planned = answer["micro_batches"], answer["rows"][-1]
    assert status == 0 and answer["batch"] == 4 and chosen["accumulation"] > 1
    assert planned["peak_bytes"] <= answer["budget_bytes"] == chosen["budget_bytes"] < answer["rows"][0]["peak_bytes"]
    assert planned["gradients"] == "within tolerance" and chosen["check"]["passed"]
    assert "in float64" in chosen["check"]["expected"]


@pytest.mark.slow
def test_measure_of_a_global_batch_that_fits_is_bit_for_bit(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, answer = measured(model, capsys, "--batch", "auto", "--global-batch", "2", "--budget", "100%")
    assert status == 0 and answer["micro_batches"]["accumulation"] == 1
    assert answer["rows"][-1]["gradients"] == "identical"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--global-batch", "8"), "--global-batch is what --batch auto cuts"),
        (("--batch", "auto"), "say how large it is (--global-batch)"),
        (("--batch", "auto", "--global-batch", "0"), "--global-batch of at least 1, not 0"),
        (("--batch", "0"), "expected --batch of at least 1, not 0"),
    ],
)
def test_measure_refuses_half_of_it(
    asked: tuple[str, ...], said: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["measure", model, *asked]) == 2
    assert said in capsys.readouterr().err
