"""`check --site`: its answers are those of `check`, what was answered is kept, and nobody's folder is written over."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tightfit import forecast
from tightfit.catalog import gpu
from tightfit.cli.program import main
from tightfit.core import Device, Trace, Unsupported
from tightfit.device.cost import retimed
from tightfit.forecast import Setup
from tightfit.forecast import site as sites
from tightfit.forecast.recording import reached
from tightfit.forecast.search import QUICK
from tightfit.forecast.survey import (
    CardAnswer,
    How,
    Survey,
    Way,
    _timed_for,
    one_op_bytes,
    step_seconds,
    survey,
    with_workspace,
)
from tightfit.plan import lowest, simulate
from tightfit.plan.account import bytes_reserved
from tightfit.trace.fake import FakeStep

TINY = Setup(model="tightfit-demo", method="full", batch=1, seq=64)


@pytest.fixture(scope="module")
def recorded() -> Trace:
    return forecast.trace_setup(TINY, gpu("rtx-4090"))


# ------------------------------------------------------------------------------------------------ the answers


def test_the_answers_are_those_of_the_trace_and_stand_on_the_page(
    recorded: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "site"
    asked = ["check", "tightfit-demo", "--site", str(out), "--method", "full", "--seq", "64",
             "--gpu", "rtx-4090,602MiB"]  # fmt: skip
    assert main([*asked, "--json"]) == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert "tightfit-demo, full, 64 tokens (1 of 1): tracing" in printed.err
    (found,) = document["cells"]
    timed = retimed(recorded, reached(gpu("rtx-4090")))
    fits, way, reserved, seconds, slowdown = found["answers"][0]
    assert (fits, reserved, slowdown) == (1, bytes_reserved(recorded, None), 1.0)
    assert seconds == pytest.approx(sum(op.seconds for op in timed.ops), rel=1e-3)
    assert found["ways"][way]["peak_owner"] == simulate(recorded).peak_owner
    fits, way, reserved, *_ = found["answers"][1]
    assert not fits and found["ways"][way]["how"] == "floor" and reserved > document["cards"][1]["usable_bytes"]
    assert document["question"]["options"] == "" and document["environments"][0]["torch"]
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "tightfit-demo" in page and "Error bar" in page
    # nothing is asked again, and the page is drawn from the data alone
    monkeypatch.setattr(sites, "survey", None)
    (out / "index.html").unlink()
    assert main(asked) == 0
    assert capsys.readouterr().out.splitlines() == [
        str(out / "index.html"), "2 answers (1 models, 2 cards): 1 fit"
    ]  # fmt: skip
    assert (out / "index.html").read_text(encoding="utf-8") == page


def same_but_rates(one: Any, other: Any) -> None:
    for each in dataclasses.fields(one):
        if each.name not in ("device", "out_bytes_per_second", "back_bytes_per_second", "ops"):
            assert getattr(one, each.name) == getattr(other, each.name), each.name
    for a, b in zip(one.ops, other.ops, strict=True):
        assert dataclasses.replace(a, seconds=0.0) == dataclasses.replace(b, seconds=0.0)


def test_cards_of_other_workspaces_share_a_trace(recorded: Trace) -> None:
    size = FakeStep(gpu("mi300x")).workspace_bytes
    assert size != FakeStep(gpu("rtx-4090")).workspace_bytes
    same_but_rates(with_workspace(recorded, size), forecast.trace_setup(TINY, gpu("mi300x")))


def test_one_op_is_less_than_any_plan_and_more_than_nothing(recorded: Trace) -> None:
    static = sum(recorded.static_bytes.values())
    made = lowest(recorded, effort=QUICK)
    assert static < one_op_bytes(recorded) <= made.peak_bytes
    # seconds of many cards at once are those of one at a time
    fast, slow = step_seconds(recorded, made, [gpu("h100-sxm"), gpu("rtx-4090")])
    assert len(set(_timed_for(recorded, [gpu("t4"), gpu("a10")]).ops)) == len(recorded.ops)  # the referee has such sets
    assert fast < slow == pytest.approx(step_seconds(recorded, made, [gpu("rtx-4090")])[0], rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["760MiB", "720MiB", "690MiB", "680MiB", "660MiB", "640MiB"])
def test_a_survey_answers_as_check_does(size: str) -> None:
    """Without a plan, with one, in tiles, too small by a little, too small by much."""
    setup = Setup(model="tightfit-demo", method="lora", batch=4, seq=512)
    card = forecast.device_asked(size)
    found = survey(setup, [card])
    answer = forecast.check(setup, card, search=False)
    (made,) = found.answers
    assert made.fits is answer.fits
    if answer.fits:
        assert answer.plan is not None
        how = How.PLAIN if answer.modes[0].fits else How.PLAN if answer.plan.exact else How.TILES
        assert found.ways[made.way].how is how and made.reserved_bytes <= answer.usable_bytes
        assert made.step_seconds == pytest.approx(answer.modes[-1].step_seconds, rel=0.05)


# ------------------------------------------------------------------------------------------------- the folder


def made_up(setup: Setup, cards: list[Device], progress: Callable[[str], None]) -> Survey:
    way = Way(how=How.PLAIN, peak_bytes=1, peak_owner="forward of x: aten.mm", by_category={"saved": 1})
    answers = (
        CardAnswer(card=card.name, fits=True, way=0, reserved_bytes=1, step_seconds=0.123456, slowdown=1.0)
        for card in cards
    )
    return Survey(ways=(way,), answers=tuple(answers), notes=())


@pytest.fixture
def surveyed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str, int]]]:
    """Surveys that cost nothing; which were made."""
    seen: list[tuple[str, str, int]] = []

    def survey(setup: Setup, cards: list[Device], *, progress: Callable[[str], None]) -> Survey:
        if len(seen) == 2 and seen[0][0] == "pythia-410m":
            seen.clear()
            raise KeyboardInterrupt
        seen.append((setup.model, setup.method, setup.seq))
        if setup.model == "opt-1.3b":
            raise Unsupported("no such step")
        return made_up(setup, cards, progress)

    monkeypatch.setattr(sites, "survey", survey)
    yield seen


def test_three_methods_and_the_lengths_that_there_are(tmp_path: Path, surveyed: list[tuple[str, str, int]]) -> None:
    out = tmp_path / "site"
    assert main(["check", "llama-3-8b", "--site", str(out), "--gpu", "t4"]) == 0
    assert surveyed == [("llama-3-8b", m, n) for m in ("full", "lora", "qlora") for n in (1024, 4096, 8192)]
    document = json.loads((out / "answers.json").read_text())
    assert document["cells"][0]["answers"] == [[1, 0, 1, 0.1235, 1.0]]
    # another model goes into the same folder, in the catalog's order
    assert main(["check", "gpt2", "--site", str(out), "--gpu", "t4", "--method", "lora,full", "--seq", "512"]) == 0
    document = json.loads((out / "answers.json").read_text())
    assert [(c["model"], c["method"]) for c in document["cells"][:3]] == [
        ("gpt2", "full"), ("gpt2", "lora"), ("llama-3-8b", "full")
    ]  # fmt: skip


def test_an_interrupted_run_goes_on(
    tmp_path: Path, surveyed: list[tuple[str, str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["check", "pythia-410m", "--site", str(tmp_path / "site"), "--gpu", "t4", "--seq", "128"]
    assert main(asked) == 130
    assert len(json.loads((tmp_path / "site" / "answers.json").read_text())["cells"]) == 2
    assert "2, of which 2 fit" in (tmp_path / "site" / "index.html").read_text()
    assert main(asked) == 0
    assert surveyed == [("pythia-410m", "qlora", 128)]


def test_runs_beside_each_other_lose_nothing(
    tmp_path: Path, surveyed: list[tuple[str, str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run writes while this one is at work."""
    out, asked = tmp_path / "site", ["--gpu", "t4", "--seq", "128", "--method", "lora"]
    alone = sites.survey

    def beside(setup: Setup, cards: list[Device], **said: Any) -> Survey:
        monkeypatch.setattr(sites, "survey", alone)
        assert main(["check", "gpt2", "--site", str(out), *asked]) == 0
        return alone(setup, cards, **said)

    monkeypatch.setattr(sites, "survey", beside)
    assert main(["check", "gpt2-medium", "--site", str(out), *asked]) == 0
    document = json.loads((out / "answers.json").read_text())
    assert [cell["model"] for cell in document["cells"]] == ["gpt2", "gpt2-medium"]
    assert "2, of which 2 fit" in (out / "index.html").read_text()


def test_other_versions_are_answered_again(tmp_path: Path, surveyed: list[tuple[str, str, int]]) -> None:
    asked = ["check", "gpt2", "--site", str(tmp_path), "--gpu", "t4", "--seq", "128", "--method", "full"]
    assert main(asked) == 0
    file = tmp_path / "answers.json"
    document = json.loads(file.read_text())
    document["environments"][0]["torch"] = "1.0"
    file.write_text(json.dumps(document))
    assert main(asked) == 0
    document = json.loads(file.read_text())
    assert len(surveyed) == 2 and [cell["environment"] for cell in document["cells"]] == [1]


def test_a_step_that_is_refused_is_an_answer_too(
    tmp_path: Path, surveyed: list[tuple[str, str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "site"
    assert main(["check", "opt-1.3b", "--site", str(out), "--gpu", "t4", "--seq", "128"]) == 0
    assert "3 steps cannot be forecast" in capsys.readouterr().out
    assert "no such step" in (out / "index.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "it holds other files"),
        ("--html x.html", "--html is about one answer"),
        ("--max 1GiB", "--max is about one answer"),
        ("--lengths x", "--lengths is about one answer"),
        ("--levers all", "--levers is about one answer"),
        ("--budget 50%", "--budget is about one answer"),
        ("--batch auto", "--batch auto is about one answer"),
        ("--world-size 2", "--world-size is about one answer"),
        ("--method qlra", "did you mean 'qlora'?"),
        ("--gpu rtx4090x", "did you mean rtx-4090"),
        ("--gpu 100MiB", "leaves nothing for tensors"),
        ("--seq 1", "at least 2 tokens"),
    ],
)
def test_what_is_refused_writes_nothing(
    arguments: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["check", "gpt2", "--site", str(tmp_path), *arguments.split()]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1 and printed.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ("{}", "holds no answers of this tightfit's"), ("no json", "cannot read"), (None, "no folder"),
        ('{"type": "WillItRun", "schema_version": 1}', "is damaged"),
        (
            '{"type": "WillItRun", "schema_version": 1, "question": {}, "cards": [], "environments": [], "models": {}, '
            '"cells": [{}]}',
            "is damaged",
        ),
    ],
)  # fmt: skip
def test_a_place_that_is_no_site(
    there: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "there"
    if there is None:
        out.write_text("a file")
    else:
        out.mkdir()
        (out / "answers.json").write_text(there)
    assert main(["check", "gpt2", "--site", str(out)]) == 2
    assert said in capsys.readouterr().err


def test_no_tokens_and_a_folder_that_cannot_be_made_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    out = tmp_path / "site"
    assert main(["check", "gpt2", "--site", str(out), "--seq", "0"]) == 2 and not out.exists()
    monkeypatch.setattr(Path, "mkdir", refused)
    assert main(["check", "gpt2", "--site", str(out), "--seq", "128"]) == 2
    assert "cannot write a site to" in capsys.readouterr().err


def test_another_question_is_refused(
    tmp_path: Path, surveyed: list[tuple[str, str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["check", "gpt2", "--site", str(tmp_path / "site"), "--seq", "128", "--gpu"]
    assert main([*asked, "t4"]) == 0
    for other, said in ((["t4", "--batch", "2"], "other options (batch 1,"), (["a10"], "other cards")):
        assert main([*asked, *other]) == 2
        assert said in capsys.readouterr().err
    assert len(surveyed) == 3
    options = ["--batch", "2", "--dtype", "fp16", "--accumulate"]
    assert main([*asked[:3], str(tmp_path / "other"), *asked[4:], "t4", *options]) == 0
    document = json.loads((tmp_path / "other" / "answers.json").read_text())
    assert document["question"]["options"] == " ".join(options)


def test_a_folder_is_claimed_before_the_first_answer(
    tmp_path: Path,
    surveyed: list[tuple[str, str, int]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, answered = tmp_path / "site", sites._cell
    refused: list[int] = []

    def beside(*arguments: Any) -> dict[str, Any]:
        monkeypatch.setattr(sites, "_cell", answered)
        refused.append(main(["check", "gpt2", "--site", str(out), "--seq", "128", "--gpu", "a10"]))
        return answered(*arguments)

    monkeypatch.setattr(sites, "_cell", beside)
    assert main(["check", "gpt2", "--site", str(out), "--seq", "128", "--gpu", "t4"]) == 0
    assert refused == [2] and "other cards" in capsys.readouterr().err


def test_a_model_is_named_unless_a_site_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 2
    assert "say which model" in capsys.readouterr().err
