"""Tables for the terminal, and the JSON documents that `--json` prints.

A plan is explained unit by unit: what is kept and what is run again, what that buys and costs, and why the peak is
where it is. Equal neighbours are shown as one row. Figures are the trace's and the simulator's own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tightfit.core import (
    Category,
    Choice,
    Forecast,
    Kind,
    Measurement,
    MicroBatches,
    Plan,
    Proof,
    Row,
    Status,
    Trace,
    format_bytes,
    to_json,
)
from tightfit.device.calibration import Calibration
from tightfit.levers import used
from tightfit.plan.account import account, account_lines
from tightfit.plan.program import kept_values, recipe, shared
from tightfit.plan.shares import Share, shares
from tightfit.plan.simulate import simulate, under

__all__ = [
    "doctor_table",
    "explain",
    "explanation",
    "forecast_report",
    "forecast_table",
    "gpus_table",
    "how_it_fits",
    "levers_said",
    "measurement_report",
    "measurement_table",
    "plan_report",
    "proof_table",
    "run_table",
    "sparkline",
]

# --------------------------------------------------------------------------------------------- measurement


def measurement_table(measured: Measurement) -> RenderableType:
    """The three modes side by side, and the note."""
    table = Table(
        title=f"{measured.model}, {measured.method}, batch {measured.batch} x {measured.seq}, {measured.dtype}, "
        f"{measured.device}",
        title_justify="left",
    )
    table.add_column("")
    for row in measured.rows:
        table.add_column(MODES.get(row.mode, row.mode), justify="right")
    base = measured.rows[0]

    def line(name: str, cell: Any) -> None:
        table.add_row(name, *(cell(row) for row in measured.rows))

    line("peak, measured", lambda r: f"{format_bytes(r.peak_bytes)} ({r.peak_bytes / base.peak_bytes:.0%})")
    line("peak, predicted", lambda r: f"{format_bytes(r.predicted_peak_bytes)} ({_off(r)})")
    line("above the step's start", lambda r: format_bytes(r.activation_peak_bytes))
    line("step", lambda r: f"{r.step_seconds:.2f} s ({r.step_seconds / base.step_seconds:.2f} x)")
    line("recompute", lambda r: _recompute(r.recompute_flops, r.forward_flops))
    line("gradients", lambda r: r.gradients)
    budget = Text(
        f"budget {format_bytes(measured.budget_bytes)} ({measured.budget_bytes / base.predicted_peak_bytes:.0%} of the "
        f"unplanned peak); plan {measured.plan.status.value}, {measured.plan.replays} units replayed"
    )
    return Group(table, budget, *_cut(measured.micro_batches), Text(measured.note))


def _cut(chosen: MicroBatches | None) -> list[Text]:
    if chosen is None:
        return []
    said = [Text(f"tightfit: {chosen.said}")]
    if chosen.check is not None:
        apart = f"{chosen.check.measured} (at most {chosen.check.tolerance.partition(':')[0]})"
        said.append(Text(f"the batch cut and uncut, in float64 where possible: {apart}"))
    return said


MODES = {"none": "no checkpointing", "every-block": "every block", "tightfit": "tightfit"}


def _off(row: Row) -> str:
    return f"{row.peak_bytes / row.predicted_peak_bytes - 1:+.2%}"


def _recompute(recompute_flops: int, forward_flops: int) -> str:
    if not forward_flops:
        return "no counted FLOPs"
    return f"{recompute_flops / 1e9:,.1f} GFLOP ({recompute_flops / forward_flops:.0%} of forward)"


def measurement_report(measured: Measurement) -> dict[str, Any]:
    """The document of `measure --json`. `micro_batches` is there if a global batch was to be cut."""
    return _document(measured)


def _document(answer: Measurement | Forecast) -> dict[str, Any]:
    report: dict[str, Any] = to_json(answer)
    report["plan"] = None if answer.plan is None else plan_report(answer.plan)
    if answer.micro_batches is None:
        del report["micro_batches"]
    return report


def plan_report(plan: Plan) -> dict[str, Any]:
    """The plan without its programs, which only the engine needs."""
    report: dict[str, Any] = to_json(plan)
    del report["programs"]
    return report


# ----------------------------------------------------------------------------------------------------- run

_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 72, top: float | None = None) -> str:
    """`values` as one line of bars from zero to `top` (their highest), each the highest of its interval."""
    if not values:
        return ""
    step = max(1, -(-len(values) // width))
    highest = [max(values[i : i + step]) for i in range(0, len(values), step)]
    top = top or max(highest) or 1
    return "".join(_BARS[max(0, min(len(_BARS) - 1, int(v / top * len(_BARS))))] for v in highest)


def run_table(document: Mapping[str, Any]) -> RenderableType:
    """The page's answer, figures, checks, timeline and plan for the terminal. Names are shown as they are."""
    table = Table(show_header=False)
    for name, value in document["facts"].items():
        table.add_row(Text(str(name)), Text(str(value)))
    lines: list[RenderableType] = [
        Text(document["answer"], style="bold green" if document["good"] else "bold red"), table
    ]  # fmt: skip
    for check in document["checks"]:
        lines.append(Text(f"{check['name']}: {'passed' if check['passed'] else 'FAILED'} ({check['measured']})"))
    study = document.get("study")
    if study:
        shown = study["points"][study["chosen"]]
        base = next(point for point in study["points"] if point["name"] == "none")
        drawn = Table.grid(padding=(0, 1))
        for name, point in (("no plan", base), ("this plan", shown)):
            live = [sum(moment["by_category"]) for moment in point["moments"]]
            drawn.add_row(name, sparkline(live, 48, base["peak_bytes"]), format_bytes(point["peak_bytes"]))
        lines += [Text("live bytes through the step, on one scale:"), drawn]
        lines.append(Text(f"the peak is at: {shown['peak_owner']}"))
        lines.append(_plan_table(study, shown))
    return Group(*lines)


_ACTIONS = {"k": "kept", "r": "recomputed", "o": "offloaded", "t": "in tiles"}
_INPUTS = {"k": "kept", "o": "offloaded", "s": "made again"}


def _plan_table(study: Mapping[str, Any], point: Mapping[str, Any]) -> Table:
    """What `point` does with what backward reads of each unit; neighbours that are treated alike are one row."""
    used = [letter for letter in _ACTIONS if any(letter in row for row in point["kept"])]
    given = point.get("inputs") or "k" * len(study["units"])
    table = Table(title="the plan: bytes of each unit that backward reads", title_justify="left")
    table.add_column("units", overflow="fold")
    for letter in used:
        table.add_column(_ACTIONS[letter], justify="right")
    table.add_column("input")
    alike: list[tuple[list[str], tuple[Any, ...]]] = []
    for unit, row, letter in zip(study["units"], point["kept"], given, strict=True):
        what = (unit["kind"], row, letter, bool(unit["pinned"]))
        if alike and alike[-1][1] == what:
            alike[-1][0].append(unit["path"])
        else:
            alike.append(([unit["path"]], what))
    for paths, (kind, row, letter, pinned) in alike:
        name = paths[0] if len(paths) == 1 else f"{paths[0]} to {paths[-1].rsplit('.', 1)[-1]} ({len(paths)} alike)"
        cells = []
        for action in used:
            sizes = [t["size_bytes"] for t, a in zip(study["kinds"][kind], row, strict=True) if a == action]
            cells.append(f"{format_bytes(sum(sizes))} ({len(sizes)})" if sizes else "-")
        table.add_row(Text(name + (", kept whole" if pinned else "")), *cells, _INPUTS[letter])
    return table


# ------------------------------------------------------------------------------------------------ forecast

_FORECAST_ROWS = (
    ("parameters", "weights"), ("quantised_parameters", "quantised weights"), ("gradients", "gradients"),
    ("optimizer_state", "optimizer state"), ("buffers", "buffers"), ("inputs", "batch"),
    ("saved", "saved tensors"), ("loss", "loss and logits"), ("temporaries", "temporaries"),
    ("collectives", "gathered weights, buckets"), ("workspace", "kernel workspace"),
    ("allocator_slack", "allocator slack"),
)  # fmt: skip


def forecast_table(forecast: Forecast) -> RenderableType:
    """The answer first; then each way to run the step, by category, and what would help."""
    shown = f"{forecast.model}, {forecast.method}, {forecast.dtype}, batch {forecast.batch} x {forecast.seq}"
    verdict = Text(
        f"{'fits' if forecast.fits else 'does not fit'}: {shown} on {forecast.gpu} "
        f"({format_bytes(forecast.gpu_bytes)}, {format_bytes(forecast.usable_bytes)} for tensors)",
        style="bold green" if forecast.fits else "bold red",
    )
    table = Table(title="bytes at the peak (forecast)", title_justify="left")
    table.add_column("")
    for mode in forecast.modes:
        table.add_column(MODES.get(mode.mode, mode.mode), justify="right")

    def line(name: str, cell: Any) -> None:
        table.add_row(name, *(cell(mode) for mode in forecast.modes))

    for key, name in _FORECAST_ROWS:
        if any(mode.by_category.get(key) for mode in forecast.modes):
            line(name, lambda m, key=key: format_bytes(m.by_category.get(key, 0)))
    table.add_section()
    line("peak, allocated", lambda m: format_bytes(m.peak_bytes))
    line("reserved", lambda m: format_bytes(m.reserved_bytes))
    line("fits", lambda m: "yes" if m.fits else "no")
    line("step (estimated)", lambda m: f"{m.step_seconds:.2f} s ({m.slowdown:.2f} x)")
    line("tokens/s (estimated)", lambda m: f"{float(f'{m.tokens_per_second:.3g}'):,.0f}")  # an estimate
    lines = [f"{MODES.get(m.mode, m.mode)}: the peak is in {m.peak_phase}, at: {m.peak_owner}" for m in forecast.modes]
    lines += [f"plan: {said}" for said in forecast.essence]
    if forecast.account is not None:
        lines += account_lines(forecast.account, forecast.host_budget_bytes)
    if forecast.micro_batches is not None:
        lines.append(f"global batch: {forecast.micro_batches.said}")
    if forecast.largest_batch is not None:
        lines.append(
            f"largest batch found at {forecast.seq} tokens: {forecast.largest_batch or 'none'}; longest sequence at "
            f"batch {forecast.batch}: {forecast.longest_seq or 'none'} (in steps of 64); the plan of a run is searched "
            "for longer, and may hold a little more"
        )
    lines += [f"it would fit: {said}" if " fit" in said else said for said in forecast.advice]
    if forecast.calibration:
        lines.append(f"calibration: {forecast.calibration}")
    lines += [*forecast.notes, f"error bar: {forecast.error_bar}"]
    # what is to be copied stays on one line: rich wraps all but that
    return Group(verdict, table, *(Text(said, overflow="ignore" if "--levers " in said else None) for said in lines))


def calibration_table(made: Calibration) -> RenderableType:
    """What was measured on a device, and how far each figure's points lie from it."""
    device = made.device
    table = Table(title=f"{device.name}, measured in {made.seconds:.0f} s", title_justify="left")
    for column in ("", "measured", "spread"):
        table.add_column(column, justify="left" if not column else "right")

    def line(name: str, said: str, *keys: str) -> None:
        if {key.split(" of ")[0] for key in keys} & set(made.estimated):
            said = f"not measured, {said} estimated"
        spread = [made.spread[key] for key in keys if key in made.spread]
        table.add_row(name, said, f"{max(spread):.1%}" if spread else "")

    line("memory", format_bytes(device.memory_bytes))
    usable = "not measured" if device.usable_bytes is None else format_bytes(device.usable_bytes)
    line("of it usable", usable)
    workspace = device.workspace_bytes
    line("workspaces of matrix products", "not measured" if workspace is None else format_bytes(workspace))
    for dtype, rate in device.flops_per_second.items():
        line(f"matrix products, {dtype}", f"{rate / 1e12:.3f} TFLOP/s", f"flops_per_second of {dtype}")
    moves = [key for key in made.spread if key.startswith("memory_bytes_per_second")] or ["memory_bytes_per_second"]
    line("ops that move bytes", f"{device.memory_bytes_per_second / 1e9:.1f} GB/s", *moves)
    line("copies to the host", f"{device.d2h_bytes_per_second / 1e9:.1f} GB/s", "d2h_bytes_per_second")
    line("copies from the host", f"{device.h2d_bytes_per_second / 1e9:.1f} GB/s", "h2d_bytes_per_second")
    line("launch of an op", f"{(device.launch_seconds or 0) * 1e6:.1f} us", "launch_seconds")
    for name, said in made.settings.items():
        line(name, said)
    return Group(table, *map(Text, made.notes))


def gpus_table(forecasts: Sequence[Forecast]) -> RenderableType:
    """One row per GPU, those that run it first, fastest first."""
    first, waits = forecasts[0], any(each.host_bytes for each in forecasts)
    table = Table(
        title=f"{first.model}, {first.method}, {first.dtype}, batch {first.batch} x {first.seq}", title_justify="left"
    )
    table.add_column("GPU")
    for name in ("memory", "fits", "step (estimated)", "slowdown", "recompute", *["in host memory"] * waits):
        table.add_column(name, justify="right")
    for each in forecasts:
        best = each.modes[-1]
        forward = each.plan.forward_flops if each.plan is not None else 0
        table.add_row(
            each.gpu,
            format_bytes(each.gpu_bytes),
            "yes" if each.fits else "no",
            f"{best.step_seconds:.2f} s" if each.fits else "-",
            f"{best.slowdown:.2f} x" if each.fits else "-",
            f"{best.recompute_flops / forward:.0%} of forward" if each.fits and forward else "-",
            *[format_bytes(sum(each.host_bytes.values())) if each.fits else "-"] * waits,
        )
    bars = [f"error bar: {first.error_bar}", *(n for n in first.notes if all(n in each.notes for each in forecasts))]
    bars += [f"calibration of {each.gpu}: {each.calibration}" for each in forecasts if each.calibration]
    return Group(table, *map(Text, bars))


def forecast_report(forecast: Forecast) -> dict[str, Any]:
    """The document of `check --json`. `micro_batches` is there if a global batch was cut."""
    return _document(forecast)


# -------------------------------------------------------------------------------------------------- doctor


def doctor_table(document: Mapping[str, Any]) -> RenderableType:
    """The traps of `doctor --json`, those that bite first and with their mend; then why checkpointing saves no more."""
    asked = document["asked"]
    table = Table(title=f"traps for {asked}" if asked else "traps in the installed versions", title_justify="left")
    for column in ("trap", "verdict", "evidence"):
        table.add_column(column, overflow="fold", no_wrap=column == "verdict")
    order = ("bites", "cannot tell", "not here")
    for trap in sorted(document["traps"], key=lambda trap: order.index(trap["verdict"])):
        bites = trap["verdict"] == "bites"
        evidence = trap["why"]
        if bites and trap["here"] is not None:
            evidence += f"\nin the installed versions: {trap['stack']['why']}"
        if bites:
            evidence += f"\nmend: {trap['mend']}"
        table.add_row(
            trap["name"],
            Text(trap["verdict"], style="bold red" if bites else ""),
            Text(f"{trap['sentence']}\n{evidence}" if bites else evidence),
        )
    lines: list[RenderableType] = [table]
    if document["why_no_saving"] is not None:
        lines += _why_no_saving(document["why_no_saving"])
    lines += [Text(f"note: {note}") for note in document["notes"]]
    return Group(*lines)


def _why_no_saving(why: Mapping[str, Any]) -> list[RenderableType]:
    setup = why["setup"]
    shown = ", ".join(str(setup[key]) for key in ("model", "method", "dtype", "optimizer"))
    shown += f", batch {setup['batch']} x {setup['seq']}"
    table = Table(title=f"why no saving? {shown} (simulated)", title_justify="left")
    table.add_column("the step", overflow="fold")
    for column in ("peak", "recompute"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("owner of the peak", overflow="fold")
    forward = why["plain"]["forward_flops"]

    def row(name: str, way: Mapping[str, Any]) -> None:
        forward = way["forward_flops"]
        share = f"{way['recompute_flops'] / forward:.0%} of forward" if forward else "-"
        table.add_row(name, format_bytes(way["peak_bytes"]), share, way["owner"])

    row("no checkpointing", why["plain"])
    row("every block checkpointed", why["checkpointed"])
    for fix in why["tried"]:
        row(f"and {fix['what']}" + ("" if fix["helps"] else " (does not help)"), fix)
    lines: list[RenderableType] = [table, Text(why["answer"])]
    if len(why["steps"]) > 1:
        lines.append(
            Text(
                "one after the other: "
                + "; ".join(f"{fix['what']}: {format_bytes(fix['peak_bytes'])}" for fix in why["steps"])
            )
        )
    lines.append(
        Text(
            f"of it no checkpointing moves {format_bytes(why['fixed_bytes'])}: "
            "weights, gradients, optimizer state, batch"
        )
    )
    same = why["same_peak_recompute_flops"]
    if same is not None and forward:
        lines.append(
            Text(
                f"the same peak costs {same / forward:.1%} of the forward's FLOPs with tightfit's plan, "
                f"{why['checkpointed']['recompute_flops'] / forward:.0%} with every block"
            )
        )
    return lines


# --------------------------------------------------------------------------------------------------- proof


def proof_table(proof: Proof) -> Table:
    table = Table(title="proof", title_justify="left")
    for column in ("check", "expected", "measured", "tolerance", ""):
        table.add_column(column, overflow="fold")
    for check in proof.checks:
        verdict = "passed" if check.passed else "[red]failed[/red]"
        table.add_row(check.name, check.expected, check.measured, check.tolerance, verdict)
    return table


# ------------------------------------------------------------------------------------------------ the plan


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitExplained:
    """What a plan does in one unit. Bytes and seconds are of all its calls in a step."""

    unit: str
    action: str  # keep all, recompute, or why it is pinned
    needed_bytes: int  # what backward reads of the unit's own values
    kept_bytes: int  # held by autograd or stored for the replay
    ops: int
    rerun_ops: int
    rerun_seconds: float
    forward_seconds: float
    rerun_most: tuple[tuple[str, float], ...]  # op name -> seconds, most expensive first


def explanation(trace: Trace, plan: Plan) -> tuple[UnitExplained, ...]:
    """One entry per unit, in the model's order."""
    trace = under(trace, plan)
    choices = {choice.unit: choice for choice in plan.choices}
    return tuple(_explained(trace, unit.path, choices.get(unit.path), unit.pinned) for unit in trace.units)


def _explained(trace: Trace, path: str, choice: Choice | None, pinned: str) -> UnitExplained:
    frames = {frame.id for frame in trace.frames if frame.unit == path}
    sizes = {(trace.ops[v.producer].frame, v.ordinal): v.size_bytes for v in trace.values if v.producer is not None}
    ops = [op for op in trace.ops if op.frame in frames and op.ordinal is not None]
    needed = kept = rerun = 0
    seconds: dict[str, float] = defaultdict(float)
    plan = shared([trace.programs[frame] for frame in frames])
    for frame in frames:
        program = trace.programs[frame]
        wanted = set(program.needed)
        needed += sum(sizes[frame, v] for v in wanted)
        if choice is None or choice.keeps_all or len(choice.actions) != program.values:
            kept += sum(sizes[frame, v] for v in wanted)
            continue
        chosen = recipe(plan or program, kept_values(choice.actions))
        kept += sum(sizes[frame, v] for v in (wanted - chosen.dropped) | chosen.captured)
        mine = [op for op in ops if op.frame == frame]
        for ordinal in chosen.runs:
            rerun += mine[ordinal].kind is not Kind.VIEW
            seconds[mine[ordinal].name] += mine[ordinal].seconds
    return UnitExplained(
        unit=path or "the model",
        action="recompute" if rerun else pinned or "keep all",
        needed_bytes=needed,
        kept_bytes=kept,
        ops=len(ops),
        rerun_ops=rerun,
        rerun_seconds=sum(seconds.values()),
        forward_seconds=sum(op.seconds for op in ops),
        rerun_most=tuple(sorted(seconds.items(), key=lambda item: -item[1])[:3]),
    )


def explain(trace: Trace, plan: Plan) -> RenderableType:
    """The plan as a readable table: every unit, the peak and its owner, and what the budget leaves."""
    table = Table(title="the plan, unit by unit", title_justify="left")
    table.add_column("units", overflow="fold")
    for name in ("kept of needed", "rerun", "costs"):
        table.add_column(name, justify="right")
    table.add_column("most of it", overflow="fold")
    for group in _grouped(explanation(trace, plan)):
        first = group[0]
        share = first.kept_bytes / first.needed_bytes if first.needed_bytes else 1.0
        table.add_row(
            _range([unit.unit for unit in group]),
            f"{share:.0%} of {format_bytes(first.needed_bytes)}",
            f"{first.rerun_ops} of {first.ops} ops" if first.rerun_ops else first.action,
            f"{first.rerun_seconds / first.forward_seconds:.1%} of its forward"
            if first.rerun_ops and first.forward_seconds
            else "nothing",
            ", ".join(_short(name) for name, _ in first.rerun_most) or "-",
        )
    bought = shares(trace, plan)
    return Group(table, *([levers_table(bought, trace)] if bought else []), *(Text(line) for line in _why(trace, plan)))


def levers_table(bought: Sequence[Share], trace: Trace) -> Table:
    """What each lever of a plan buys and costs."""
    step_seconds = sum(op.seconds for op in trace.ops)
    table = Table(title="what each lever buys: the peak would be so much higher without it", title_justify="left")
    table.add_column("lever")
    table.add_column("bytes", justify="right")
    table.add_column("costs, of the step", justify="right")
    table.add_column("how", overflow="fold")
    for share in bought:
        cost = f"{share.seconds / step_seconds:.1%}" if step_seconds else "-"
        table.add_row(share.lever.value.replace("_", " "), format_bytes(share.bought_bytes), cost, share.what)
    return table


def _grouped(units: Sequence[UnitExplained]) -> list[list[UnitExplained]]:
    """Neighbours that do the same, together."""
    groups: list[list[UnitExplained]] = []
    for unit in units:
        if groups and _alike(groups[-1][-1], unit):
            groups[-1].append(unit)
        else:
            groups.append([unit])
    return groups


def _alike(one: UnitExplained, other: UnitExplained) -> bool:
    return (one.action, one.needed_bytes, one.kept_bytes, one.rerun_ops, one.rerun_most) == (
        other.action, other.needed_bytes, other.kept_bytes, other.rerun_ops, other.rerun_most,
    )  # fmt: skip


def _range(paths: Sequence[str]) -> str:
    if len(paths) == 1:
        return paths[0]
    head = paths[0].rpartition(".")[0]
    same_head = all(path.rpartition(".")[0] == head for path in paths)
    last = paths[-1].rpartition(".")[2] if same_head else paths[-1]
    return f"{paths[0]} to {last} ({len(paths)})" if same_head else f"{paths[0]} ... {last} ({len(paths)})"


def _short(name: str) -> str:
    return name.removeprefix("aten.").removesuffix(".default")


_ROWS = (
    (Category.PARAMETERS, "parameters"), (Category.QUANTISED, "quantised parameters"),
    (Category.COLLECTIVES, "gathered weights and buffers of collectives"),
    (Category.OPTIMIZER_STATE, "optimizer state"), (Category.GRADIENTS, "gradients"), (Category.BUFFERS, "buffers"),
    (Category.INPUTS, "batch"), (Category.WORKSPACE, "kernels' workspace"), (Category.SAVED, "held for backward"),
    (Category.LOSS, "logits and loss"), (Category.TEMPORARIES, "temporaries"),
)  # fmt: skip


def _why(trace: Trace, plan: Plan) -> list[str]:
    line = simulate(trace, plan)
    before = simulate(trace)
    at_peak = {name: line.by_category[category.value][line.peak_event] for category, name in _ROWS}
    lines = [
        f"peak {format_bytes(plan.peak_bytes)} of a budget of {format_bytes(plan.budget_bytes)} "
        f"({format_bytes(plan.budget_bytes - plan.peak_bytes)} to spare); without a plan "
        f"{format_bytes(plan.unplanned_peak_bytes)}, at: {before.peak_owner}",
        f"the peak is at: {line.peak_owner}",
        "live there: " + ", ".join(f"{name} {format_bytes(size)}" for name, size in at_peak.items() if size),
    ]
    lines += levers_said(plan)
    lines += account_lines(account(trace, plan), plan.host_budget_bytes)
    lines.append(_reason(trace, plan, line.peak_owner))
    lines.append(
        f"recompute: {_recompute(plan.recompute_flops, plan.forward_flops)}, {plan.recompute_seconds:.4f} s of a step "
        f"of {plan.step_seconds:.4f} s, {plan.replays} replays"
    )
    lines.append(_proven(plan))
    return [line for line in lines if line]


def levers_said(plan: Plan) -> list[str]:
    """A line on what `plan` does by each lever that has something to say."""
    return [said for lever in used(plan) if (said := lever.said(plan))]


def how_it_fits(plan: Plan) -> str:
    """By which lever a step fits that recomputes nothing."""
    return next((how for lever in reversed(used(plan)) if (how := lever.how(plan))), "as it is")


def _reason(trace: Trace, plan: Plan, owner: str) -> str:
    if not plan.replays:
        return f"why: the step fits {how_it_fits(plan)}, so nothing is run again"
    if owner.startswith("replay of"):
        return "why: this unit's replay needs room while earlier units' kept values are still held"
    if owner.startswith("optimizer"):
        return "why: the optimizer's temporaries are the highest point; recompute cannot lower it"
    if "outside the units" in owner:
        return (
            "why: the head and the loss are there at the moment when every unit's kept values are held; "
            "what the units keep is what the budget leaves beside them"
        )
    if owner.startswith("backward"):
        return "why: gradients made so far and this unit's own backward meet what earlier units still hold"
    return "why: this unit's forward meets what earlier units hold"


def _proven(plan: Plan) -> str:
    return "; ".join([_status(plan), *([f"solved by {', '.join(plan.solved_by)}"] if plan.solved_by else [])])


def _status(plan: Plan) -> str:
    if plan.status is Status.OPTIMAL:
        return "status: optimal, proven under the planner's model"
    if not plan.recompute_seconds or not plan.bound_seconds:  # nothing runs again, or no bound is known
        return f"status: {plan.status.value}"
    gap = 1 - plan.bound_seconds / plan.recompute_seconds
    return (
        f"status: {plan.status.value}; no plan of this kind recomputes for less than {plan.bound_seconds:.4f} s "
        f"(at most {gap:.0%} below this one)"
    )
