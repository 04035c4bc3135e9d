"""Where a step does not fit, `check` names the fewest levers beside the default that would make it fit."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

import pytest

from tightfit import forecast
from tightfit.cli.program import main
from tightfit.core import Lever, Trace, parse_levers
from tightfit.forecast import Setup
from tightfit.forecast.advice import with_other_levers
from tightfit.forecast.recording import trace_for
from tightfit.forecast.room import CONTEXT_BYTES, MARGIN
from tightfit.forecast.search import QUICK, fitted
from tightfit.levers import allowed
from tightfit.plan.account import bytes_reserved, host_bytes

FULL = Setup(model="tightfit-demo", method="full", batch=1, seq=64, dtype="bf16", optimizer="adamw")
LORA = dataclasses.replace(FULL, method="lora", rank=4)
DEFAULT = {each.lever for each in allowed(None)}


@pytest.fixture(scope="module")
def traces() -> dict[str, Trace]:
    return {setup.method: trace_for(setup, forecast.device_asked("8GiB")) for setup in (FULL, LORA)}


def named_in(advice: Iterable[str]) -> frozenset[Lever]:
    """The levers that the one line about them names."""
    (line,) = [said for said in advice if "--levers" in said]
    (named,) = re.findall(r"^--levers ([a-z_,]+) fits: from [0-9.]+ MiB on, and [0-9.]+ MiB in host memory, by ", line)
    return parse_levers(named) or frozenset()


@pytest.mark.parametrize(
    ("method", "part", "more"),
    [
        pytest.param("lora", 0.9, {Lever.STREAM_WEIGHTS}, marks=pytest.mark.slow),
        ("full", 1.0, {Lever.STATE_IN_HOST}),
        ("full", 0.85, {Lever.STATE_IN_HOST, Lever.GRADIENTS_IN_HOST}),
    ],
    ids=["frozen weights", "state", "state and gradients"],
)
def test_the_fewest_levers_that_are_enough_are_named_and_are(
    traces: dict[str, Trace], method: str, part: float, more: set[Lever]
) -> None:
    recorded = traces[method]
    room = int(part * sum(recorded.static_bytes.values()))
    assert fitted(recorded, room, QUICK) is None
    levers = named_in(with_other_levers(recorded, room, None))
    assert levers - DEFAULT == more and Lever.TILE not in levers
    made = fitted(recorded, room, QUICK, levers)
    assert made is not None and bytes_reserved(recorded, made, room) is not None
    assert set(host_bytes(recorded, made)) == {each.value for each in more}
    for one in more:  # none of them could be left out
        assert fitted(recorded, room, QUICK, levers - {one}) is None


def test_no_levers_are_named_where_none_are_enough(traces: dict[str, Trace]) -> None:
    recorded = traces["full"]
    static = sum(recorded.static_bytes.values())
    assert not list(with_other_levers(recorded, static // 2, None))
    assert not list(with_other_levers(recorded, int(0.85 * static), 0))  # nothing may wait in host memory


@pytest.mark.slow  # three forecasts
def test_an_answer_of_no_names_them_and_they_are_the_answer(traces: dict[str, Trace]) -> None:
    static = sum(traces["full"].static_bytes.values())
    card = forecast.device_asked(f"{int(static * (1 + MARGIN)) + CONTEXT_BYTES + 1}")
    answer = forecast.check(FULL, card, search=False)
    assert not answer.fits
    levers = named_in(answer.advice)
    again = forecast.check(FULL, card, search=False, levers=levers)
    assert again.fits and not again.advice and again.host_bytes
    named = forecast.check(FULL, card, search=False, levers=DEFAULT)  # who names levers is not told of others
    assert not named.fits and not any("--levers" in said for said in named.advice)


def test_levers_to_paste_stay_on_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a terminal of 80 columns, too, and with names that alone are wider."""
    names = ",".join(lever.value for lever in Lever)
    assert len(names) > 80
    advice = f"--levers {names} fits: from 1.00 GiB on, by all of them"
    monkeypatch.setattr("tightfit.forecast.answer.advice_for", lambda *_: (advice,))
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["check", "tightfit-demo", "--seq", "64", "--gpu", "8GiB", "--budget", "30MiB", "--no-search"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert f"it would fit: {advice}" in lines
    assert max(len(line) for line in lines if "error bar" in line) <= 80  # what is prose is wrapped
