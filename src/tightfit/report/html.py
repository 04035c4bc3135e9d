"""One self-contained page: the answer first, then the step's memory, the plan, the trade-off, the evidence.

`document` makes the data of a page from a run, a measurement, a forecast or a plan; `page` puts it into the template
`page.html`, whose script draws from that data alone. What a reader needs first (the answer, figures, checks, the
environment) is in the HTML itself and is there without a script, on paper and in a screen reader.

Invariant: no request to any other place (a content security policy in the page says so), no code from data: every text
is escaped and the data stands in a JSON block. Refused: a run folder without a record.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from tightfit.core import Account, Forecast, InvalidInput, Measurement, Plan, Row, format_bytes, from_json, to_json
from tightfit.levers import every
from tightfit.plan.account import account_rows
from tightfit.report.study import Study

__all__ = ["forecast_document", "measurement_document", "page", "plan_document", "run_document"]


def run_document(folder: str | Path) -> dict[str, Any]:
    """The page's data of a run folder that `tightfit train` left. Raises `InvalidInput` when it is none."""
    folder = Path(folder)
    record = _read(
        folder / "record.json", "a tightfit run folder has one; give the folder that `tightfit train` printed"
    )
    if not isinstance(record, dict) or record.get("type") != "Run":
        raise InvalidInput(f"{str(folder / 'record.json')!r} is no record of a tightfit run")
    observed, constraint = record.get("observed", {}), record.get("constraint", {})
    checks = observed.get("checks", [])
    peak, budget = observed.get("peak_bytes"), constraint.get("budget_bytes")
    held = peak is not None and budget is not None and peak <= budget * 1.005
    passed = bool(checks) and all(check["passed"] for check in checks)
    gradients = next((c for c in checks if c["name"] == "gradients"), None)
    predicted = observed.get("predicted_peak_bytes")
    facts = {
        "status": record.get("status"),
        "budget": _bytes(budget),
        "peak, measured": _bytes(peak),
        "peak, predicted": _bytes(predicted),
        **_predicted(observed.get("account"), constraint.get("host_budget_bytes")),
        "reserved, measured": _bytes(observed.get("reserved_bytes")),
        "host memory, measured": _taken(observed.get("host_taken_bytes", {})),
        "without a budget, measured": _bytes(observed.get("unplanned_peak_bytes")),
        "gradients": "not compared" if gradients is None else _held(gradients),
        "loss": f"{observed['loss_start']:.3f} to {observed['loss_end']:.3f}" if observed.get("loss_end") else None,
        "recompute": _share(observed.get("recompute_flops"), observed.get("forward_flops")),
        "tokens a second": f"{observed['tokens_per_second']:,.0f}" if observed.get("tokens_per_second") else None,
    }
    model = record.get("model", {}).get("name", "the model")
    if peak is None or budget is None:
        answer = f"{model}: the run ended ({record.get('status')}) before a step was measured"
    else:
        answer = (
            f"{model} {'fits' if held else 'does NOT fit'}: peak {format_bytes(peak)} of a budget of "
            f"{format_bytes(budget)}, gradients {facts['gradients']}"
        )
    steps = []
    losses = folder / "losses.jsonl"
    if losses.is_file():
        for line in losses.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            steps.append({k: row[k] for k in ("step", "loss", "peak_bytes") if k in row})
    study_file = folder / "study.json"
    return {
        "kind": "run", "good": held and passed, "answer": answer, "facts": _said(facts), "checks": checks,
        "measured": _measured([("none", observed.get("unplanned_peak_bytes"), None), ("this run", peak, predicted)]),
        "steps": steps, "study": _read(study_file, "") if study_file.is_file() else None,
        "environment": record.get("environment", {}), "record": record,
    }  # fmt: skip


def _predicted(account: Mapping[str, Any] | None, limit_bytes: int | None) -> dict[str, str]:
    """The account of a run's record in words; records of before have none."""
    if account is None:
        return {}
    rows = account_rows(from_json(Account, account, "the run's record"), limit_bytes)
    return {f"{name}, predicted": said for name, said in rows.items()}


def _taken(sizes_bytes: Mapping[str, int]) -> str | None:
    """What the pool had from the system, by what lay behind it."""
    return ", ".join(f"{format_bytes(size)} {name}" for name, size in sizes_bytes.items() if size) or None


def measurement_document(measured: Measurement, study: Study | None = None) -> dict[str, Any]:
    """The page's data of `tightfit measure`."""
    none, *_, planned = measured.rows
    slow = _slowdown(planned, none)
    same = all(row.gradients != "differs" for row in measured.rows)
    held = planned.peak_bytes <= measured.budget_bytes * 1.005
    answer = (
        f"{measured.model} {'fits' if held else 'does NOT fit'} into {format_bytes(measured.budget_bytes)}: peak "
        f"{format_bytes(planned.peak_bytes)} instead of {format_bytes(none.peak_bytes)}, {slow:.2f} x the time, "
        "gradients "
        f"{'identical' if same else 'DIFFERENT'}"
    )
    facts = {
        "budget": format_bytes(measured.budget_bytes),
        "peak, measured": format_bytes(planned.peak_bytes),
        "peak without a plan": format_bytes(none.peak_bytes),
        "step": f"{planned.step_seconds:.3f} s, {slow:.2f} x",
        "recompute": _share(planned.recompute_flops, planned.forward_flops) or "0%",
        "gradients": "identical" if same else "DIFFERENT",
    }
    record = to_json(measured)
    record["plan"].pop("programs", None)
    return {
        "kind": "measure", "good": held and same, "answer": answer, "facts": facts, "checks": [], "note": measured.note,
        "measured": [
            {
                "mode": row.mode, "peak_bytes": row.peak_bytes, "predicted_peak_bytes": row.predicted_peak_bytes,
                "slowdown": _slowdown(row, none), "step_seconds": row.step_seconds,
                "recompute_share": row.recompute_flops / row.forward_flops if row.forward_flops else None,
                "gradients": row.gradients,
            }
            for row in measured.rows
        ], "steps": [],
        "study": None if study is None else to_json(study), "environment": dict(measured.environment), "record": record,
    }  # fmt: skip


def forecast_document(forecast: Forecast, study: Study | None = None) -> dict[str, Any]:
    """The page's data of `tightfit check`."""
    best = forecast.modes[-1]
    answer = (
        f"{forecast.model}, {forecast.method}, batch {forecast.batch} x {forecast.seq} "
        f"{'fits' if forecast.fits else 'does NOT fit'} on {forecast.gpu}: {format_bytes(best.reserved_bytes)} of "
        f"{format_bytes(forecast.usable_bytes)}, {best.slowdown:.2f} x the time (forecast, seconds estimated)"
    )
    facts: dict[str, Any] = {}
    for mode in forecast.modes:
        facts[f"{mode.mode}: reserved"] = f"{format_bytes(mode.reserved_bytes)} ({'fits' if mode.fits else 'no'})"
        facts[f"{mode.mode}: step (estimated)"] = f"{mode.step_seconds:.3f} s"
    if forecast.micro_batches is not None:
        facts["global batch"] = forecast.micro_batches.said
    if forecast.account is not None:
        facts |= account_rows(forecast.account, forecast.host_budget_bytes)
    facts["largest batch"], facts["longest sequence"] = forecast.largest_batch, forecast.longest_seq
    record = to_json(forecast)
    if record["plan"]:
        record["plan"].pop("programs", None)
    return {
        "kind": "check", "good": forecast.fits, "answer": answer, "facts": _said(facts), "checks": [],
        "note": " ".join([*forecast.essence, *forecast.advice, *forecast.notes, forecast.error_bar]),
        "measured": [], "steps": [], "study": None if study is None else to_json(study),
        "environment": dict(forecast.environment), "record": record,
    }  # fmt: skip


def _held(gradients: Mapping[str, Any]) -> str:
    if not gradients["passed"]:
        return "DIFFERENT"
    return "within tolerance" if "float64" in gradients["expected"] else "identical"


def plan_document(plan: Plan, model: str, study: Study, account: Account | None = None) -> dict[str, Any]:
    """The page's data of `tightfit plan`."""
    answer = (
        f"{model} fits into {format_bytes(plan.budget_bytes)}: peak {format_bytes(plan.peak_bytes)} instead of "
        f"{format_bytes(plan.unplanned_peak_bytes)}, {plan.slowdown:.2f} x the time (predicted)"
    )
    facts = {
        "status": plan.status.value, "replays": plan.replays,
        "recompute": _share(plan.recompute_flops, plan.forward_flops) or "0%",
        **dict(fact for lever in every() if (fact := lever.fact(plan)) is not None),
        **({} if account is None else account_rows(account, plan.host_budget_bytes)),
    }  # fmt: skip
    record = to_json(plan)
    record.pop("programs", None)
    record["account"] = to_json(account)
    return {
        "kind": "plan", "good": True, "answer": answer, "facts": _said(facts), "checks": [], "measured": [],
        "steps": [], "study": to_json(study), "environment": dict(plan.versions), "record": record,
    }  # fmt: skip


def page(document: Mapping[str, Any]) -> str:
    """The whole page as one string."""
    title = html.escape(f"tightfit: {document['answer']}"[:120])
    return filled("page.html", document, {"TITLE": title, "BODY": _head(document), "TAIL": _tail(document)})


def filled(template: str, document: Mapping[str, Any], pieces: Mapping[str, str]) -> str:
    """The page `template` with HTML in its places, what the pages' styles and scripts share, and `document` as its
    data."""
    folder = resources.files("tightfit.report")
    data = json.dumps(document, separators=(",", ":"))
    # the only way out of a script element is a less-than sign
    data = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    shared = {"STYLE": "pages.css", "SCRIPT": "pages.js"}
    texts = {piece: folder.joinpath(name).read_text(encoding="utf-8") for piece, name in shared.items()}
    pieces = {**pieces, **texts, "DATA": data}
    parts = folder.joinpath(template).read_text(encoding="utf-8").split("@@")
    return "".join(pieces[part] if i % 2 else part for i, part in enumerate(parts))


def _head(document: Mapping[str, Any]) -> str:
    verdict = "yes" if document["good"] else "no"
    facts = "".join(
        f"<div><dt>{html.escape(str(name))}</dt><dd>{html.escape(str(value))}</dd></div>"
        for name, value in document["facts"].items()
    )
    note = f"<p>{html.escape(document['note'])}</p>" if document.get("note") else ""
    return (
        f'<h1 class="answer {verdict}">{html.escape(document["answer"])}</h1>\n<dl class="facts">{facts}</dl>\n{note}'
    )


def _tail(document: Mapping[str, Any]) -> str:
    study = document["study"] or {}
    parts: list[str] = []
    rows: list[tuple[Any, ...]]
    if study.get("points"):
        parts.append(_plans(study))
    if study.get("levers"):
        rows = [
            (
                lever["lever"].replace("_", " "),
                format_bytes(lever["bought_bytes"]),
                f"{lever['slowdown']:.1%}",
                lever["how"],
            )
            for lever in study["levers"]
        ]
        parts.append(
            titled_table("What each lever buys", ("lever", "bytes", "costs, of the step", "how"), rows, figures=(1, 2))
        )
        parts.append('<p class="soft">By so much the peak of this page\'s plan would be higher without it.</p>')
    if document["measured"]:
        parts.append(_compared(document["measured"]))
    if document["checks"]:
        rows = [
            (c["name"], c["expected"], c["measured"], c["tolerance"], "passed" if c["passed"] else "FAILED")
            for c in document["checks"]
        ]
        parts.append(titled_table("Proof", ("check", "expected", "measured", "tolerance", "verdict"), rows))
    if len(document["steps"]) > 1:
        first, last = document["steps"][0], document["steps"][-1]
        peaks = [step["peak_bytes"] for step in document["steps"] if "peak_bytes" in step]
        parts.append(
            "<h2>The run, step by step</h2>"
            f"<p>Loss {first['loss']:.3f} at the first step, {last['loss']:.3f} at step {last['step']}.</p>"
            '<div class="plot"><svg id="loss" role="img" aria-label="loss by step"></svg></div>'
        )
        if peaks:
            parts.append(
                f'<p class="soft">Peak of each step: {format_bytes(min(peaks))} to {format_bytes(max(peaks))}.</p>'
                '<div class="plot"><svg id="peaks" role="img" aria-label="peak bytes by step"></svg></div>'
            )
    parts.append(titled_table("What these figures depend on", ("name", "value"), list(document["environment"].items())))
    return "\n".join(parts)


def _plans(study: Mapping[str, Any]) -> str:
    """The points of the curve as a table; the script marks the row of the budget that is shown."""
    rows = []
    for i, point in enumerate(study["points"]):
        name = {"none": "no plan", "every-block": "every block", "chosen": "this plan"}.get(
            point["name"], point["name"]
        )
        rows.append(
            (
                name if i != study["chosen"] or point["name"] == "chosen" else f"{name} (this page)",
                format_bytes(point["peak_bytes"]), f"{point['slowdown']:.2f} x", f"{point['recompute_share']:.1%}",
                point["replays"], point["peak_owner"],
            )
        )  # fmt: skip
    heads = ("plan", "peak", "slowdown", "recompute", "replays", "the peak is at")
    return titled_table(
        "The same step under other budgets", heads, rows, figures=(1, 2, 3, 4), id="curve-table", head_id="h-plans"
    )


def _compared(measured: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for row in measured:
        peak, predicted = row["peak_bytes"], row.get("predicted_peak_bytes")
        seconds, share, slow = row.get("step_seconds"), row.get("recompute_share"), row.get("slowdown")
        rows.append(
            (
                {"none": "no checkpointing", "every-block": "every block"}.get(row["mode"], row["mode"]),
                "-" if predicted is None else format_bytes(predicted),
                format_bytes(peak),
                "-" if not predicted else f"{peak / predicted - 1:+.4%}",
                "-" if seconds is None else f"{seconds:.3f} s ({slow:.2f} x)",
                "-" if share is None else f"{share:.1%}",
                row.get("gradients") or "-",
            )
        )
    heads = ["", "peak, predicted", "peak, measured", "off by", "step", "recompute", "gradients"]
    used = [i for i in range(len(heads)) if i < 3 or any(row[i] != "-" for row in rows)]
    return titled_table(
        "Predicted against measured", [heads[i] or "step run" for i in used], [[row[i] for i in used] for row in rows],
        figures=[k for k, i in enumerate(used) if 0 < i < 6],
    )  # fmt: skip


def titled_table(
    title: str,
    heads: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    figures: Sequence[int] = (),
    id: str = "",
    head_id: str = "",
) -> str:
    """A titled table; the columns `figures` are set to the right, those with long texts keep a readable width."""
    long = [i > 0 and len(heads) > 2 and any(len(str(row[i])) > 24 for row in rows) for i in range(len(heads))]
    number = [' class="n"' if i in figures else ' class="w"' if long[i] else "" for i in range(len(heads))]
    head = "".join(f'<th scope="col"{number[i]}>{html.escape(name)}</th>' for i, name in enumerate(heads))
    body = "".join(
        "<tr>" + "".join(f"<td{number[i]}>{html.escape(str(value))}</td>" for i, value in enumerate(row)) + "</tr>"
        for row in rows
    )
    said = html.escape(title)
    return (
        f"<h2{f' id={head_id!r}' if head_id else ''}>{said}</h2>"
        f'<div class="scroll" tabindex="0" role="region" aria-label="{said}, table">'
        f"<table{f' id={id!r}' if id else ''}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _said(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if value is not None}


def _bytes(size: int | None) -> str | None:
    return None if size is None else format_bytes(size)


def _share(part: int | None, whole: int | None) -> str | None:
    return f"{part / whole:.1%} of the forward's FLOPs" if part is not None and whole else None


def _measured(rows: Sequence[tuple[str, int | None, int | None]]) -> list[dict[str, Any]]:
    return [
        {"mode": mode, "peak_bytes": peak, "predicted_peak_bytes": predicted}
        for mode, peak, predicted in rows
        if peak is not None
    ]


def _slowdown(row: Row, none: Row) -> float:
    return row.step_seconds / none.step_seconds if none.step_seconds else 1.0


def _read(file: Path, advice: str) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise InvalidInput(f"cannot read {str(file)!r} ({why}): {advice}") from None
    except ValueError as error:
        raise InvalidInput(f"{str(file)!r} is not JSON ({error})") from None
