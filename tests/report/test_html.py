"""The page: the answer is in the HTML itself, nothing is fetched, data cannot break out, and it works in a browser."""

from __future__ import annotations

import functools
import html.parser
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tightfit
from tightfit.cli.program import main
from tightfit.core import Action, InvalidInput, Lever, Measurement, Row, format_bytes
from tightfit.plan import lowest
from tightfit.plan.shares import shares
from tightfit.report import (
    chrome_trace,
    draw,
    markdown_of,
    measurement_document,
    memory_snapshot,
    page,
    run_document,
    run_table,
    sparkline,
    study,
)
from tightfit.report.study import MOMENTS


@pytest.fixture(scope="module")
def recorded() -> tightfit.Trace:
    torch.manual_seed(0)
    blocks = (nn.Sequential(nn.Linear(32, 96), nn.GELU(), nn.Linear(96, 32), nn.Tanh()) for _ in range(5))
    return tightfit.trace(nn.Sequential(*blocks), torch.randn(64, 32), loss=lambda m, b: m(b).square().mean())


def document(trace: tightfit.Trace, **changed: Any) -> dict[str, Any]:
    from tightfit.core import to_json

    plan = tightfit.plan(trace, "75%")
    made = {
        "kind": "plan", "good": True, "answer": "it fits", "facts": {"peak": "1 MiB"}, "checks": [
            {"name": "gradients", "expected": "3", "measured": "3", "tolerance": "none", "passed": True}
        ], "measured": [{"mode": "none", "peak_bytes": 100_000}],
        "steps": [{"step": i, "loss": 3.0 - i, "peak_bytes": 1000 + i} for i in range(1, 4)],
        "study": to_json(study(trace, plan)), "environment": {"torch": "x"}, "record": {"a": 1},
    }  # fmt: skip
    return {**made, **changed}


def test_a_study_has_the_chosen_plan_among_at_least_sixteen(recorded: tightfit.Trace) -> None:
    plan = tightfit.plan(recorded, "75%")
    found = study(recorded, plan)
    assert len(found.points) >= 16
    assert found.points[0].name == "none" and found.points[found.chosen].name == "chosen"
    peaks = [point.peak_bytes for point in found.points]
    assert peaks == sorted(peaks, reverse=True)
    for point in found.points:
        assert len(point.kept) == len(found.units) and len(point.moments) <= MOMENTS
        assert max(sum(m.by_category) for m in point.moments) == point.peak_bytes  # thinning loses no peak
        assert all(len(row) == len(found.kinds[u.kind]) for row, u in zip(point.kept, found.units, strict=True))
    assert "r" in "".join(found.points[found.chosen].kept)
    assert set("".join(found.points[0].kept)) == {"k"}


def test_every_action_is_on_the_map_and_each_lever_in_the_table(recorded: tightfit.Trace) -> None:
    plan = lowest(recorded, levers=frozenset(Lever) - {Lever.TILE})
    found = study(recorded, plan)
    chosen = found.points[found.chosen]
    offloaded = [c for c in plan.choices if Action.OFFLOAD in (*c.actions, *c.inputs)]
    assert offloaded and plan.offloaded_bytes
    assert "o" in "".join((*chosen.kept, chosen.inputs))
    assert len(chosen.inputs) == len(found.units)
    assert {each.lever for each in found.levers} == {share.lever.value for share in shares(recorded, plan)} != set()
    assert found.points[0].inputs == "k" * len(found.units)


def test_a_swept_input_is_on_the_map() -> None:
    torch.manual_seed(0)
    blocks = (nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh()) for _ in range(8))
    deep = tightfit.trace(nn.Sequential(*blocks), torch.randn(256, 32), loss=lambda m, b: m(b).square().mean())
    plan = lowest(deep)
    assert plan.advances, "no sweep in the lowest plan of eight narrow blocks"
    found = study(deep, plan)
    assert "s" in found.points[found.chosen].inputs
    assert "nest" in {each.lever for each in found.levers}


def test_the_answer_is_there_without_a_script_and_nothing_is_fetched(recorded: tightfit.Trace) -> None:
    text = page(document(recorded))
    before_script = text[: text.index("<script")]
    assert "it fits" in before_script and "gradients" in before_script
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", text)
    assert "@import" not in text and "fetch(" not in text and "XMLHttpRequest" not in text
    assert "default-src 'none'" in text
    html.parser.HTMLParser().feed(text)


def test_data_cannot_break_out_of_the_page(recorded: tightfit.Trace) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>@@DATA@@"
    text = page(document(recorded, answer=evil, facts={evil: evil}, environment={evil: evil}))
    assert "<script>alert" not in text and "<img" not in text
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)
    assert data and json.loads(data[1])["answer"] == evil


@pytest.mark.slow  # test_page.py has one of that size from made-up data
def test_a_page_of_32_layers_is_small() -> None:
    from tightfit.catalog import gpu
    from tightfit.forecast import Setup, trace_for

    trace = trace_for(Setup(model="llama-2-7b", method="lora", batch=1, seq=2048, optimizer="none"), gpu("h100-sxm"))
    plan = tightfit.plan(trace, "90%")
    assert len(page(document(trace, study=None)).encode()) < 100_000
    from tightfit.core import to_json

    assert len(page(document(trace, study=to_json(study(trace, plan)))).encode()) < 2_000_000


@pytest.mark.slow
def test_check_traces_once_for_its_page_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tightfit import forecast

    made: list[bool] = []
    real = forecast.trace_for

    def counted(*given: Any, **named: Any) -> tightfit.Trace:
        made.append(bool(named.get("tiles")))
        return real(*given, **named)

    monkeypatch.setattr(forecast, "trace_for", counted)
    asked = ["check", "tightfit-demo", "--seq", "256", "--gpu", "2GiB", "--no-search"]
    without = [main(asked), list(made)]
    made.clear()
    assert [main([*asked, "--html", str(tmp_path / "c.html")]), made] == without
    assert "fits on" in (tmp_path / "c.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_forecasts_trace_is_that_of_its_plan() -> None:
    from tightfit import forecast

    setup = forecast.Setup(model="tightfit-demo", batch=8, seq=512, optimizer="none")
    traces: list[tightfit.Trace] = []
    answer = forecast.check(setup, forecast.device_asked("4GiB"), budget="110MiB", search=False, traced=traces.append)
    (trace,) = traces
    assert answer.plan is not None and answer.plan.tiling is not None and trace.tiled
    assert tightfit.simulate(trace, answer.plan).peak_bytes == answer.modes[-1].peak_bytes


def test_measured_rows_reach_the_page_as_they_are(recorded: tightfit.Trace) -> None:
    rows = tuple(
        Row(
            mode=mode, peak_bytes=peak, predicted_peak_bytes=1000, activation_peak_bytes=1, step_seconds=seconds,
            recompute_flops=flops, forward_flops=100, gradients=gradients,
        )
        for mode, peak, seconds, flops, gradients in [
            ("none", 1000, 2.0, 0, "reference"), ("every-block", 500, 3.0, 90, "identical"),
            ("tightfit", 610, 2.2, 10, "identical"),
        ]
    )  # fmt: skip
    measured = Measurement(
        model="m", method="full", batch=1, seq=2, dtype="fp32", device="cpu", environment={}, rows=rows,
        budget_bytes=610, plan=tightfit.plan(recorded, "75%"), note="",
    )  # fmt: skip
    shown = measurement_document(measured)
    assert [(m["mode"], m["peak_bytes"], m["slowdown"]) for m in shown["measured"]] == [
        ("none", 1000, 1.0), ("every-block", 500, 1.5), ("tightfit", 610, 1.1)
    ]  # fmt: skip
    text = page(shown)
    assert "<td>every block</td>" in text and "-50.0000%" in text and "3.000 s (1.50 x)" in text


def test_exports(recorded: tightfit.Trace) -> None:
    import pickle

    plan = tightfit.plan(recorded, "75%")
    line = tightfit.simulate(recorded, plan)
    events = chrome_trace(line)["traceEvents"]
    counters = [sum(e["args"].values()) for e in events if e["ph"] == "C"]
    assert max(counters) == line.peak_bytes and len(counters) == len(line.labels)
    snapshot = pickle.loads(memory_snapshot(recorded, plan))  # our own bytes, a line above
    live, top = {}, 0
    for entry in snapshot["device_traces"][0]:
        if entry["action"] == "alloc":
            assert entry["addr"] not in live
            live[entry["addr"]] = entry["size"]
        elif entry["action"] == "free_completed":
            del live[entry["addr"]]
        top = max(top, sum(live.values()))
    assert abs(top - line.peak_bytes) <= recorded.random_state_bytes * 10 + 64
    assert sparkline([0, 1, 2, 4]) == "▁▃▅█" and sparkline([]) == ""


def test_torchs_own_readers_read_the_snapshot(recorded: tightfit.Trace) -> None:
    """Whatever of `torch.cuda._memory_viz` takes a snapshot; its flame graphs would fetch a script first."""
    import pickle

    from torch.cuda import _memory_viz as viz

    plan = tightfit.plan(recorded, "75%")
    snapshot = pickle.loads(memory_snapshot(recorded, plan))  # our own bytes
    entries = snapshot["device_traces"][0]
    taken = [e["size"] for e in entries if e["action"] == "alloc"]
    freed = [e["size"] for e in entries if e["action"] == "free_completed"]
    (segment,) = snapshot["segments"]
    asked = [b["requested_size"] for b in segment["blocks"] if b["state"] == "active_allocated"]
    assert sum(asked) == segment["requested_size"] == sum(taken) - sum(freed) > 0
    assert sum(b["size"] for b in segment["blocks"]) == segment["total_size"]
    assert viz.calc_active(segment) == segment["active_size"] >= sum(asked)

    said = viz.trace(snapshot)
    assert f"{len(entries)} entries" in said
    assert "MEM[" not in said and said.count(":") >= len(taken)  # every block lies in the segment
    assert said.count("# free completed") == len(freed) and said.count("cudaMalloc") == 1
    end = segment["address"] + segment["total_size"]
    assert max(e["addr"] + e["size"] for e in entries if e["action"] == "alloc") <= end
    assert "segments: 1\n" in viz.segsum(snapshot)
    for plot in (viz.trace_plot, viz.segment_plot):
        text = plot(snapshot)
        assert "<html" in text or "<script" in text
    lines = viz.memory(snapshot, format_flamegraph=lambda text: text).splitlines()
    assert sum(int(line.rsplit(" ", 1)[1]) for line in lines) == segment["total_size"]
    assert any("lives through the step" in line for line in lines)
    assert viz.segments(snapshot, format_flamegraph=lambda text: text)
    unplanned = pickle.loads(memory_snapshot(recorded))
    assert viz.compare(unplanned["segments"], snapshot["segments"], format_flamegraph=lambda text: text) is not None
    kept = viz.filter_alloc_free_pairs(snapshot)["device_traces"][0]
    assert sum(e["size"] for e in kept if e["action"] == "alloc") == sum(asked)


def test_markdown_says_the_answer_and_the_checks(recorded: tightfit.Trace) -> None:
    text = markdown_of(document(recorded))
    assert text.startswith("**it fits**") and "| gradients | 3 | 3 | passed |" in text and "every-block" in text


def test_the_terminal_says_what_the_page_says(recorded: tightfit.Trace) -> None:
    from rich.console import Console

    made = document(recorded, answer="[red]it[/red] fits", facts={"[b]peak": "[/nonsense]"})
    units = made["study"]["units"]
    units[0]["path"] = "[red]first[/red]"
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(run_table(made))
    text = console.export_text()
    assert "[red]it[/red] fits" in text and "[b]peak" in text and "[/nonsense]" in text and "[red]first[/red]" in text
    assert "gradients: passed (3)" in text
    chosen = made["study"]["points"][made["study"]["chosen"]]
    assert f"the peak is at: {chosen['peak_owner']}" in text
    no_plan, this_plan = (
        next(line for line in text.splitlines() if line.startswith(n)) for n in ("no plan", "this plan")
    )
    assert "█" in no_plan and "█" not in this_plan  # one scale
    assert format_bytes(chosen["peak_bytes"]) in this_plan
    # the figures of the first unit, from the study's own letters
    sizes = [tensor["size_bytes"] for tensor in made["study"]["kinds"][units[0]["kind"]]]
    kept = [size for size, letter in zip(sizes, chosen["kept"][0], strict=True) if letter == "k"]
    row = next(line for line in text.splitlines() if "first" in line)
    assert f"{format_bytes(sum(kept))} ({len(kept)})" in row


def test_alike_neighbours_are_one_row_of_the_terminals_plan(recorded: tightfit.Trace) -> None:
    from rich.console import Console

    made = document(recorded)
    point = made["study"]["points"][made["study"]["chosen"]]
    point["kept"] = [point["kept"][0]] * 3 + ["o" * len(point["kept"][0])] * (len(point["kept"]) - 3)
    point["inputs"] = "k" * len(point["kept"])
    for unit in made["study"]["units"]:
        unit["kind"] = made["study"]["units"][0]["kind"]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(run_table(made))
    text = console.export_text()
    assert "0 to 2 (3 alike)" in text and "3 to 4 (2 alike)" in text and "offloaded" in text


def test_a_picture_shows_what_was_measured(recorded: tightfit.Trace, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(document(recorded), tmp_path / "without.png")
    draw(
        document(recorded, measured=[{"mode": "every-block", "peak_bytes": 200_000, "slowdown": 1.4}]),
        tmp_path / "with.png",
    )
    without, given = ((tmp_path / f"{name}.png").read_bytes() for name in ("without", "with"))
    assert without.startswith(b"\x89PNG") and given.startswith(b"\x89PNG") and without != given
    with pytest.raises(InvalidInput, match="nothing to draw"):
        draw(document(recorded, study=None), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidInput, match=r"record\.json"):
        run_document(tmp_path)
    (tmp_path / "record.json").write_text("{}")
    with pytest.raises(InvalidInput, match="no record"):
        run_document(tmp_path)
    (tmp_path / "record.json").write_text("{")
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


@pytest.mark.slow
def test_plan_writes_a_page_and_refuses_a_place_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tightfit.report.study", functools.partial(study, points=3))
    target = tmp_path / "plan.html"
    asked = [
        "plan", "tightfit-demo", "--batch", "4", "--seq", "128", "--budget", "80%", "--optimizer", "none",
        "--out", str(tmp_path / "p.json"),
    ]  # fmt: skip
    assert main([*asked, "--html", str(tmp_path / "no" / "plan.html")]) == 2
    assert not (tmp_path / "p.json").exists()
    assert main([*asked, "--html", str(target)]) == 0
    assert "fits into" in target.read_text(encoding="utf-8")
