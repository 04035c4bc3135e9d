"""Write `docs/cli.md` from the program's own `--help`, `docs/reference.md` from its docstrings, `docs/architecture.svg`
and the table of packages beside it from its imports; `docs/peers.md`, `docs/zoo.md`, `docs/forecast.md`,
`docs/traps.md`, `docs/switches.md`, and every page's measured parts from `benchmarks/results`. The README there is told
which results are older than the code.

Invariant: the page depends on the program alone, not on the terminal: the width is fixed and colour is off; every
figure in a measured part (between `<!-- measured: NAME; written by docs/generate.py -->` and `<!-- measured: end -->`)
is in a results file.
Refused: none of it is edited by hand; `--check` exits 1 when a file differs from what would be written.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import html
import importlib.util
import inspect
import json
import math
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = Path(__file__).with_name("cli.md")
PEERS = Path(__file__).with_name("peers.md")
ZOO = Path(__file__).with_name("zoo.md")
FORECAST = Path(__file__).with_name("forecast.md")
TRAPS = Path(__file__).with_name("traps.md")
SWITCHES = Path(__file__).with_name("switches.md")
LEVERS = Path(__file__).with_name("levers_measured.md")
SEVERAL_GPUS = Path(__file__).with_name("several_gpus_measured.md")
GPU = Path(__file__).with_name("gpu.md")
README = ROOT / "README.md"
KIT = ROOT / "benchmarks" / "gpu"
RESULTS = ROOT / "benchmarks" / "results"
REFERENCE = Path(__file__).with_name("reference.md")
ARCHITECTURE = Path(__file__).with_name("architecture.svg")
MEASURED = re.compile(
    r"(<!-- (?P<kind>measured|generated): (?P<name>[a-z0-9-]+); written by docs/generate\.py -->\n)"
    r".*?(<!-- (?P=kind): end -->\n)",
    re.DOTALL,
)
WIDTH = 100
HEAD = """\
<!-- Written by docs/generate.py (`make docs`); do not edit. -->

# Command line
"""


def fix_terminal() -> None:
    """Pin width and colour; must run before typer is imported, because typer reads them on import."""
    os.environ.update(TERMINAL_WIDTH=str(WIDTH), COLUMNS=str(WIDTH), NO_COLOR="1", TERM="dumb")
    os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"
    for name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS"):
        os.environ.pop(name, None)


def help_texts() -> Iterator[tuple[str, str]]:
    """(`tightfit measure`, its help text) for the program and each of its commands, in the program's order."""
    import typer.main
    from typer.testing import CliRunner

    from tightfit.cli.program import app

    runner = CliRunner()
    commands = getattr(typer.main.get_command(app), "commands", {})
    visible = [name for name, command in commands.items() if not command.hidden]
    for arguments in ([], *([name] for name in visible)):
        result = runner.invoke(app, [*arguments, "--help"], prog_name="tightfit")
        if result.exit_code != 0:
            raise SystemExit(f"`tightfit {' '.join(arguments)} --help` failed: {result.output}") from result.exception
        yield " ".join(["tightfit", *arguments]), result.output


def render() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, text in help_texts():
        body = "\n".join(line.rstrip() for line in text.strip("\n").splitlines())
        parts.append(f"\n## `{title}`\n\n```text\n{body}\n```\n")
    return "".join(parts)


def evidence() -> str:
    """README's first figures, from the results files that are there."""
    parts = [
        "Every figure on this page was measured on a CPU. "
        + ("No GPU has run tightfit yet. " if _of_a_card() is None else "What a GPU measured is on a page of its own. ")
        + "What is forecast for one, against published tables, is in [docs/gpu.md](docs/gpu.md), with the list of "
        "which figures are from what.\n"
    ]
    for name in ("gpt2", "gpt2-medium"):
        file = RESULTS / f"measure_{name}.json"
        if file.exists():
            parts.append(_measured_table(name, json.loads(file.read_text(encoding="utf-8"))))
    zoo, cases = (RESULTS / f"{name}.json" for name in ("zoo", "random_modules"))
    if zoo.exists():
        counts = json.loads(zoo.read_text(encoding="utf-8"))["counts"]
        trained = sum(n for status, n in counts.items() if not status.startswith("cannot"))
        parts.append(
            f"{trained} transformers architectures could be built small and trained. {counts['ok']} of them gave the "
            "same gradients bit for bit within their budgets (`benchmarks/zoo.py`). [docs/zoo.md](docs/zoo.md) lists "
            "every architecture, with the reason where one could not be built or did not pass.\n"
        )
    if cases.exists():
        tally = json.loads(cases.read_text(encoding="utf-8"))
        parts.append(
            f"Random modules ran under random plans (`benchmarks/random_modules.py`): {tally['cases']:,} cases with "
            f"{tally['replays']:,} replays, of which {len(tally['failures'])} gave a different gradient.\n"
        )
    return "\n".join(parts)


def measured() -> str:
    """README's other figures."""
    parts = []
    step = RESULTS / "step.json"
    if step.exists():
        parts.append(_reached(json.loads(step.read_text(encoding="utf-8"))))
    for name, told in (
        ("forecast", _forecast), ("peers", _against_peers), ("overhead", _overhead), ("planning", _planning),
        ("seconds", _seconds),
    ):  # fmt: skip
        file = RESULTS / f"{name}.json"
        if file.exists():
            parts.append(told(json.loads(file.read_text(encoding="utf-8"))))
    return "\n".join(parts)


#: One of each kind; the measured part names them as a part of all.
README_PEERS = (
    "every block (torch.utils.checkpoint)",
    "selective: save products and attention",
    "torch_remat: save attention",
    "torch's partitioner, budget 0.4",
)


def _compared(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in found["rows"] if "extra_flops" in row]


def _against_peers(found: dict[str, Any]) -> str:
    rows = _compared(found)
    good = [row for row in rows if row["extra_flops"] <= row["peer_extra_flops"] * 0.9 + 1e-6]
    timed = [row for row in rows if "time" in row]
    slower = [row for row in timed if row["time"] > row["peer_time"] * 1.03]
    wrong = [row for row in rows if row["gradients"] != "identical"]
    shown = [
        row
        for row in rows
        if row["seq"] == min(r["seq"] for r in rows) and row["model"] == "gpt2-lora" and row["peer"] in README_PEERS
    ]
    return (
        "Each peer was measured first, and its peak was then given to tightfit as the budget (`benchmarks/peers.py`). "
        "The peak is the activation peak as a part of the unplanned one; the extra FLOPs are those of a step. These "
        f"are four of the {len(rows)} rows; all of them are in [docs/peers.md](docs/peers.md):\n\n"
        + _peer_table(shown)
        + "\n![peak against recompute](docs/peers.png)\n\n"
        f"In {len(good)} of {len(rows)} comparisons tightfit needs at most 0.9 of the peer's extra FLOPs. "
        f"{len(timed)} comparisons were timed; in {len(slower)} of them tightfit is slower than the peer by more than "
        f"3 %. In {len(wrong)} comparisons its gradients differ from the plain step's.\n"
    )


def _peer_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | peer | its peak | its extra FLOPs | tightfit's | its step time | tightfit's |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = [f"{row[k]:.2f}" if k in row else "" for k in ("peer_time", "time")]
        model = f"{row['model']}, {row['seq']}"
        lines.append(
            f"| {model} | {row['peer']} | {row['peer_peak']:.3f} | {row['peer_extra_flops']:.1%} "
            f"| {row['extra_flops']:.1%} | {times[0]} | {times[1]} |"
        )
    return "\n".join(lines) + "\n"


def peers_page() -> str:
    """docs/peers.md: every comparison, those that were lost included."""
    file = RESULTS / "peers.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"rows": []}
    failed = [row for row in found["rows"] if "extra_flops" not in row]
    notes = "".join(
        f"- {row['model']}, {row['seq']}, {row['peer']}: "
        + (row.get("peer_failed") or f"no plan reaches its peak; the least is {row.get('least_peak')}")
        + "\n"
        for row in failed
    )
    return (
        "<!-- Written by docs/generate.py (`make docs`); do not edit. -->\n\n# Peers\n\n"
        "Each peer's step was measured; then tightfit was given the peer's peak as its budget. The columns are:\n\n"
        "- peak: the activation peak of forward and backward by the allocator's count, as a part of the unplanned "
        "step's;\n"
        "- extra FLOPs: those of matrix products and attention beyond the plain step's;\n"
        "- step time: the ratio to the plain step in the same run.\n\n"
        "The table is written from `benchmarks/results/peers.json`.\n\n"
        + _peer_table(_compared(found))
        + ("\nNot compared:\n\n" + notes if notes else "")
        + "\n"
        + _by_hand(_read("by_hand"))
    )


def _by_hand(found: dict[str, Any]) -> str:
    """Models that are checkpointed by hand, and what tightfit makes of the same steps."""
    rows = [
        "## Checkpointed by hand",
        "",
        "Some models have a switch for checkpointing, and some people put `torch.utils.checkpoint` into a model "
        "themselves. For each row such a step was measured. tightfit was then given the same model without the "
        "switch.",
        "",
        "Each cell gives the peak of the step's activations. Then it says what runs again, as a part of the forward: "
        "first its FLOPs, then its seconds. Only matrix products, convolutions and attention have FLOPs, so other ops "
        "show in the seconds alone. An op's seconds are those that the recording measured, whoever runs it again. The "
        "columns are:",
        "",
        "- by hand: the measured step with the switch on;",
        "- at that peak: tightfit's plan for the same peak, which reruns the fewest seconds;",
        "- fewest FLOPs: its plan for the same peak when ops are priced by their FLOPs;",
        "- lowest: the lowest peak that it finds.",
        "",
        "Every plan gave the bits of the step without a plan. "
        "The table is written from `benchmarks/results/by_hand.json`.",
        "",
        "| model, by hand | no plan | by hand | at that peak | fewest FLOPs | lowest |",
        "|---|---|---|---|---|---|",
    ]
    plans = ("by_hand", "tightfit_at_equal_peak", "tightfit_fewest_flops", "tightfit_lowest")
    for row in found["rows"]:
        if row["status"] != "measured":
            rows.append(f"| {row['model']} | {row['status']} | | | | |")
            continue
        none = f"{row['none']['peak_bytes'] / 2**20:.2f} MiB"
        rows.append(f"| {row['said']} | {none} | {' | '.join(_rerun_cell(row[name]) for name in plans)} |")
    return "\n".join(rows) + "\n"


def _rerun_cell(plan: dict[str, Any]) -> str:
    if "rerun" not in plan:
        return "no plan found"
    return f"{plan['peak_bytes'] / 2**20:.2f} MiB, {plan['rerun']:.0%}, {plan['rerun_seconds']:.0%}"


def zoo_page() -> str:
    """docs/zoo.md: every architecture, those that could not be built included."""
    found = json.loads((RESULTS / "zoo.json").read_text(encoding="utf-8"))
    lines = [
        "<!-- Written by docs/generate.py (`make docs`); do not edit. -->\n\n# Architectures\n",
        "These are tiny models with random weights, made from the configs that transformers ships. Each was tested at "
        "two budgets: 75 % and 50 % of the activation peak, or the least that is feasible. The tests compare the "
        "gradients bit for bit, compare the allocator's peak with the budget, and remove the plan again. The table is "
        "written from `benchmarks/results/zoo.json`: "
        + ", ".join(f"{number} {status}" for status, number in found["counts"].items())
        + ".\n",
        "| architecture | outcome | units | budgets, of the activation peak | recompute, of the forward's FLOPs "
        "| whole replays | prediction off by |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        if row["status"] != "ok":
            reason = row["reason"][:100].replace("|", "/").replace("`", "'")
            lines.append(f"| {row['name']} | {row['status']}: {reason} | | | | | |")
            continue
        shares, recompute = (", ".join(f"{x:.0%}" for x in row[k]) for k in ("shares", "recompute_share"))
        lines.append(
            f"| {row['name']} | ok | {row['units']} | {shares} | {recompute} | {row['fallbacks']} "
            f"| {row['prediction_off']:.3%} |"
        )
    return "\n".join(lines) + "\n"


def traps_page() -> str:
    """docs/traps.md: each trap with what its probe saw, and in which versions."""
    found = json.loads((RESULTS / "traps.json").read_text(encoding="utf-8"))
    machine = found["environment"]
    parts = [
        "<!-- Written by docs/generate.py (`make docs`); do not edit. -->\n\n# Traps\n",
        "These are things that go wrong around activation checkpointing in this stack, most of them without an "
        "error.\n",
        "- `tightfit doctor` probes each trap on the installed versions.\n"
        "- `tightfit doctor run.yaml`, or `tightfit doctor` with a model, says which traps affect that run and what "
        "owns its peak.\n"
        "- `tightfit.doctor.examine(model, batch)` examines a live model.\n",
        "A probe runs the trap on a tiny model and looks at the outcome. If a release no longer has the trap, the "
        "probe therefore says so.\n",
        f"These outcomes were seen on {found['date']} with Python {machine['python']} on {machine['platform']}, by "
        "`python benchmarks/traps.py`.\n",
    ]
    for row in found["rows"]:
        seen = [row["quick"], *([row["deep"]] if "deep" in row else [])]
        parts += [
            f"## {row['name']}\n",
            f"{row['sentence']}\n",
            *(f"- {each['verdict']}: {each['why']}" for each in seen),
            f"- mend: {row['mend']}",
            "- versions: " + ", ".join(f"{package} {version}" for package, version in row["versions"].items()) + "\n",
        ]
    return "\n".join(parts)


def _forecast(found: dict[str, Any]) -> str:
    said = found["summary"]
    return (
        f"The forecast of `tightfit check` was compared with the CPU allocator's count (`benchmarks/forecast.py`). "
        f"There are {said['cases']} steps of 8 architectures: full, LoRA and QLoRA, with and without checkpointing and "
        f"plans. The forecast is off by {said['mean_error']:.4%} in the mean and {said['worst_error']:.4%} at worst. "
        f"For a single phase (forward, backward, optimizer) it is off by {said['worst_phase_error']:.4%} at worst. On "
        "a GPU it was not measured yet. More is in [docs/forecast.md](docs/forecast.md).\n"
    )


def _large(found: dict[str, Any]) -> list[str]:
    """What `check` says of models that are large for a card."""
    from tightfit.levers import allowed

    default = {each.lever.value for each in allowed(None)}
    slow = [row for row in found["rows"] if row["cpu_seconds"] > found["within_seconds"]]
    lines = [
        "\n## Large models on small cards\n",
        "`tightfit check` was asked about four models that are large for their card: by the default levers, and by "
        "those that its answer names where they are not enough (`benchmarks/forecast.py --part large`). Only with the "
        "default levers the largest batch and the longest sequence were looked for. Seconds are the processor's. "
        f"{len(slow)} of {len(found['rows'])} answers took more than {found['within_seconds']} of them.\n",
        "| question | levers beside the default | fits | peak | in host memory | tokens/s (estimated) "
        "| largest batch, longest sequence | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def sizes(row: dict[str, Any]) -> str:
        found = (row["largest_batch"], row["longest_seq"])
        return "not asked" if found == (None, None) else ", ".join(str(size or "none") for size in found)

    for row in found["rows"]:
        more = [f"`{name}`" for name in row["levers_asked"].split(",") if name and name not in default]
        waiting = sum(row["host_bytes"].values())
        speed = "-" if row["tokens_per_second"] is None else f"{float(format(row['tokens_per_second'], '.3g')):,.0f}"
        lines.append(
            f"| {row['case']} | {', '.join(more) or '-'} | {'yes' if row['fits'] else 'no'} "
            f"| {row['peak_bytes'] / 2**30:.2f} of {row['room_bytes'] / 2**30:.2f} GiB "
            f"| {format(waiting / 2**30, '.1f') + ' GiB' if waiting else '-'} | {speed} "
            f"| {sizes(row)} | {row['cpu_seconds']:.0f} |"
        )
    return lines


def forecast_page() -> str:
    """docs/forecast.md: how far the forecast is off, the standard question, and what checkpointing does by size."""
    cases, scaling = (json.loads((RESULTS / f"{n}.json").read_text(encoding="utf-8")) for n in ("forecast", "scaling"))
    said = cases["summary"]
    parts = [
        "<!-- Written by docs/generate.py (`make docs`); do not edit. -->\n\n# The forecast\n",
        (Path(__file__).with_name("forecast_head.md")).read_text(encoding="utf-8"),
        "## How far it is off\n",
        f"The forecast was compared with {said['cases']} real steps on the CPU (`benchmarks/forecast.py`, seed "
        f"{cases['seed']}; other seeds draw other cases). Its mean error is {said['mean_error']:.4%}, its worst "
        f"{said['worst_error']:.4%}. For the peaks of {said['phases']} single phases the mean error is "
        f"{said['mean_phase_error']:.4%}, the worst {said['worst_phase_error']:.4%}.\n",
        "![forecast against measured](forecast.png)\n",
        "| architecture | method | dtype | batch x length | optimizer | way | measured | off by | worst phase |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in cases["rows"]:
        worst = max((abs(p["error"]), name) for name, p in row["phases"].items())
        way = row["mode"] if row["mode"] != "tightfit" else f"tightfit, {row['replays']} replays"
        parts.append(
            f"| {row['arch']} | {row['method']} | {row['dtype']} | {row['batch']} x {row['seq']} | {row['optimizer']} "
            f"| {way} | {row['measured_bytes']:,} B | {row['error']:+.4%} | {worst[1]} {worst[0]:.4%} |"
        )
    if "large" in cases:
        parts += _large(cases["large"])
    parts.append("\n## The standard question\n")
    parts.append(
        "From which length on do the activations of Llama-2-7B pass 20 GB, in 16 bits, at batch 1, without "
        "checkpointing? Activations are here the peak without weights, gradients and optimizer state. The lengths were "
        "tried in steps of 64 tokens, with the kernels of an H100:\n"
    )
    parts += ["| method | first length over 20 GB | its activations | one step below |", "|---|---|---|---|"]
    for answer in scaling["standard_question"]:
        below = answer.get("below")
        parts.append(
            f"| {answer['method']} | {answer['seq'] or 'none up to 4,096'} "
            f"| {answer['activation_bytes'] / 1e9:.2f} GB | "
            + (f"{below['seq']}: {below['activation_bytes'] / 1e9:.2f} GB |" if below else "|")
        )
    parts.append(
        "\nThe command for one length is `tightfit check llama-2-7b --method full --seq 3136 --gpu h100-sxm "
        "--optimizer none --no-search`. `python benchmarks/scaling.py` makes the table. LoRA needs more than full "
        "fine-tuning because PEFT keeps its adapters in float32, and with them a float32 copy of every adapted layer's "
        "input.\n"
    )
    parts.append("## From GPT-2 to 70B\n")
    parts.append(
        "All figures are forecast, for bf16, batch 1 and an H100's kernels. The activation peak is what the step adds "
        "to what lives throughout it, gradients included. Recompute is a part of the forward's FLOPs. The slowdown is "
        "estimated.\n\n"
        "![saving and slowdown by size](scaling.png)\n"
    )
    parts += [
        "| model | method, length | none | every block | tightfit at 50 % | tightfit at 25 % |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip

    def cell(mode: dict[str, Any]) -> str:
        if "share" not in mode:
            return f"least is {mode['least_share']:.0%}"
        return (
            f"{mode['activation_peak_bytes'] / 2**30:.2f} GiB ({mode['share']:.0%}), recompute "
            f"{mode['recompute_of_forward']:.0%}, {mode['slowdown_estimated']:.2f} x"
        )

    for row in scaling["rows"]:
        modes = row["modes"]
        parts.append(
            f"| {row['model']} | {row['method']}, {row['seq']} "
            f"| {modes['none']['activation_peak_bytes'] / 2**30:.2f} GiB "
            + "".join(f"| {cell(modes[way])} " for way in ("every-block", "tightfit at 50%", "tightfit at 25%"))
            + "|"
        )
    return "\n".join(parts) + "\n"


def _overhead(found: dict[str, Any]) -> str:
    return (
        "The engine's own work per op was measured on tensors so small that little else takes time "
        "(`benchmarks/overhead.py`). With the same values kept, it takes "
        f"{found['ratio']['step_microseconds_per_op']:.2f} of the time of torch's selective checkpointing in a whole "
        f"step, and {found['ratio']['forward_microseconds_per_op']:.2f} in the forward.\n"
    )


def _planning(found: dict[str, Any]) -> str:
    by_model: dict[str, list[dict[str, Any]]] = {}
    for row in found["rows"]:
        by_model.setdefault(row["model"], []).append(row)
    told = "; ".join(
        f"for {model} a plan takes at most {max(r['plan_seconds'] for r in rows[1:]):.1f} s of the processor, and its "
        f"step is within {max(r['gap_of_step'] for r in rows[1:]):.1%} of the proven bound (at the lowest peak "
        f"{rows[0]['plan_seconds']:.0f} s and "
        + ("no bound, since that plan is nested)" if rows[0]["is_nested"] else f"{rows[0]['gap_of_step']:.1%})")
        for model, rows in by_model.items()
    )
    curve = [
        f"| {row['step']} | {row['ops']:,} | {row['trace_seconds']:.0f} | {row['first_plan_seconds']:.1f} | "
        f"{min(row['plan_seconds']):.1f} to {max(row['plan_seconds']):.1f} | {row['lowest_seconds']:.1f} |"
        for row in found.get("curve", ())
    ]
    fits = "; ".join(
        f"for {row['model']} it takes {row['fit_seconds']:.0f} s of the processor, the time of "
        f"{row['fit_in_steps']:.1f} of the model's own steps"
        for row in found.get("fit", ())
    )
    lines = [
        "Planning was tried with LoRA in bf16, 2,048 tokens and no weights in memory, at ten budgets from the lowest "
        f"peak up, beside other work (`benchmarks/planning.py`): {told}.",
        "",
        "So it grows with the step (seconds of the processor, beside other work; the first plan of a trace, then plans "
        "of the same trace at other budgets, and the lowest peak):",
        "",
        "| step | ops | trace | first plan | further plans | lowest peak |",
        "|---|---|---|---|---|---|",
        *curve,
        "",
        *([f"`fit` records a step and plans it: {fits}.", ""] if fits else []),
    ]
    return "\n".join(lines)


def _seconds(found: dict[str, Any]) -> str:
    predicted, busy = found["predicted"]["rows"], found["busy"]["rows"]
    modes = list(predicted[0]["modes"])

    def ratio(row: dict[str, Any], mode: str) -> float:
        return float(row["modes"][mode]["predicted_of_measured"])

    recomputing = [row for row in busy if row["recompute_flops"]]
    worst = max(row["worst_ratio"] for row in recomputing)
    none_more = all(not any(row["beside_loops"]) for row in busy if not row["recompute_flops"])
    lines = [
        "A step's seconds are predicted from one recording. Predicted of measured seconds on this processor, medians "
        "of steps in turns (`benchmarks/seconds.py`):",
        "",
        "| step | " + " | ".join(modes) + " |",
        "|---|" + "---|" * len(modes),
        *(f"| {row['step']} | " + " | ".join(f"{ratio(row, mode):.2f}" for mode in modes) + " |" for row in predicted),
        "| median | " + " | ".join(f"{statistics.median(ratio(r, m) for r in predicted):.2f}" for m in modes) + " |",
        "",
        "The same steps were recorded and planned again with two endless loops beside them on the two cores, three "
        f"times each. Of {len(busy)} steps, {len(recomputing)} rerun matrix products at this budget; beside the loops "
        f"those rerun at most {worst:.2f} of their FLOPs"
        + (", and the others still none.\n" if none_more else ", and some of the others rerun some.\n"),
    ]
    return "\n".join(lines)


def _measured_table(name: str, found: dict[str, Any]) -> str:
    rows = found["rows"]
    share = found["budget_bytes"] / rows[0]["predicted_peak_bytes"]
    lines = [
        f"`tightfit measure {name} --batch {found['batch']} --seq {found['seq']} --budget {share:.0%}` (full "
        f"fine-tuning, AdamW, {found['dtype']}, dropout on, {found['environment']['cpu_count']} CPU cores, torch "
        f"{found['environment']['torch']}):",
        "",
        "| | "
        + " | ".join({"none": "no checkpointing"}.get(r["mode"], r["mode"].replace("-", " ")) for r in rows)
        + " |",
        "|---|" + "---|" * len(rows),
    ]

    def line(title: str, cell: Any) -> None:
        lines.append(f"| {title} | " + " | ".join(cell(row) for row in rows) + " |")

    line("peak, allocator's count", lambda r: f"{r['peak_bytes']:,} B ({r['peak_bytes'] / rows[0]['peak_bytes']:.1%})")
    line("peak, predicted", lambda r: f"off by {r['peak_bytes'] / r['predicted_peak_bytes'] - 1:+.4%}")
    line("recomputed, of the forward's FLOPs", lambda r: f"{r['recompute_flops'] / r['forward_flops']:.1%}")
    line("step, ratio in the same run", lambda r: f"{r['step_seconds'] / rows[0]['step_seconds']:.2f}")
    line("gradients", lambda r: r["gradients"])
    lines += [
        "",
        "On this machine a step that allocates less is faster than one that recomputes nothing, because fresh memory "
        "pages cost more time than the recompute. Bytes and FLOPs carry over to other machines. The ratio of "
        "seconds does not."
        if rows[1]["step_seconds"] < rows[0]["step_seconds"]
        else "Bytes and FLOPs carry over to other machines. The ratio of seconds does not.",
        "",
    ]
    return "\n".join(lines)


def _reached(found: dict[str, Any]) -> str:
    rows = found["prediction"]
    worst = max(abs(row["prediction_off"]) for row in rows)
    over = max(row["over_budget"] for row in rows)
    same = sum(row["gradients"].endswith("identical") for row in rows)
    near = sum(row["passed"] for row in rows) - same
    shares = "; ".join(
        f"{name}: " + ", ".join(f"{kept}, {share:.1%} rerun" for kept, share in points.items())
        for name, points in found["frontier"].items()
    )
    return (
        f"The predicted peak was compared with the allocator's count in {len(rows)} cases (gpt2 and a LoRA Llama; "
        f"fp32, bf16, autocast; `benchmarks/step.py`). It is off by at most {worst:.4%} and over the budget by at most "
        f"{max(over, 0):.4%}. The gradients are identical in {same} cases. In {near}, whose plans are in tiles, they "
        "are within the rounding that float64 allows. For each part of what backward needs that is kept, these are the "
        f"estimated seconds that run again, as a part of a block's forward: {shares}.\n"
    )


SWITCHES_HEAD = """\
<!-- Written by docs/generate.py (`make docs`) from benchmarks/results; do not edit. -->

# Switches

```python
import torch
from torch import nn

import tightfit

model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(4)))
batch, loss = torch.randn(512, 64), lambda model, batch: model(batch).square().mean()

tightfit.enable(model)  # every unit runs again; for any nn.Module
print(tightfit.active(model))  # what is on, by whom, on which units, what it saves; false: nothing
print(tightfit.active(model, batch, loss=loss))  # the saving measured, by the allocator's own count
tightfit.disable(model)

tightfit.enable(model, batch, budget="70%", loss=loss)  # a plan instead: what has to run again, no more
tightfit.disable(model)
assert not tightfit.active(model)
```

A transformers model is switched through its own flags, so `model.is_activation_checkpointing` says what is on. While
tightfit's checkpointing is on, `model.activation_checkpointing_enable()` and `model.gradient_checkpointing_enable()`
switch it instead of the model's own.
"""


def switches_page() -> str:
    """docs/switches.md: the switches, and what the usual tutorial says beside what was measured."""
    parts = [SWITCHES_HEAD]
    file = RESULTS / "switches.json"
    if file.exists():
        parts.append(_tutorial(json.loads(file.read_text(encoding="utf-8"))))
    file = RESULTS / "callback.json"
    if file.exists():
        parts.append(_callback(json.loads(file.read_text(encoding="utf-8"))))
    return "\n".join(parts)


def _tutorial(found: dict[str, Any]) -> str:
    lines = [
        "## What the usual tutorial says, measured (`benchmarks/switches.py`)\n",
        '**"`get_memory_footprint()` shows the saving."** It does not: it adds up parameters and buffers, which no '
        "checkpointing changes. These are the figures of one model and one step:\n",
        "| switched on | footprint | really saved of the step's peak |",
        "|---|---|---|",
    ]
    for row in found["footprint"]["rows"]:
        saved = f"{row['saves_bytes']:,} B ({row['basis']}, {row['units']} units)" if row["units"] else "nothing"
        lines.append(f"| `{row['switch']}` | {row['footprint_bytes']:,} B | {saved} |")
    said = found["called_like_a_method"]
    lines.append(
        '\n**"`model.is_gradient_checkpointing()` tells whether it is on."** It is a property: '
        + "; ".join(f"`model.{name}()` gives `{error}`" for name, error in said.items())
        + ". Without the brackets it answers.\n"
    )
    rows = found["bargains"]
    saved, extra = [row["saved"] for row in rows], [row["extra_flops"] for row in rows]
    inside = sum(0.5 <= row["saved"] <= 0.7 and 0.2 <= row["extra_flops"] <= 0.3 for row in rows)
    lines += [
        '**"It saves 50 to 70 % for 20 to 30 % more time."** That depends on the shape. Whole steps with AdamW were '
        "measured with every block checkpointed. The peaks are the allocator's count, the extra work is in FLOPs of a "
        f"forward and backward. The steps save {min(saved):.0%} to {max(saved):.0%} for {min(extra):.0%} to "
        f"{max(extra):.0%} more work. {inside} of {len(rows)} shapes lie in the ranges that the sentence claims.\n",
        "| shape | batch x seq | peak | every block | saved | extra FLOPs |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['shape']} | {row['batch']} x {row['seq']} | {row['peak_bytes'] / 2**20:.1f} MiB "
            f"| {row['every_block_peak_bytes'] / 2**20:.1f} MiB | {row['saved']:.1%} | {row['extra_flops']:.1%} |"
        )
    return "\n".join(lines) + "\n"


def _callback(found: dict[str, Any]) -> str:
    lines = [
        "## What `TightfitCallback` costs once it has planned (`benchmarks/callback.py`)\n",
        f"The counts are for an optimizer step of {found['accumulated_batches']} accumulated batches, in the steps "
        "after the second:\n",
        "| run | ops | views | forwards of the model | replays | ops run again | forwards before the first step |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        lines.append(
            f"| {row['run']} | {row['ops']:,} | {row['views']:,} | {row['forwards']} | {row['replays']} "
            f"| {row['rerun_ops']} | {row['forwards_before_the_first_step']} |"
        )
    ratio = found["time_ratio"]
    time = found["time_ratio_note"] if ratio is None else ", ".join(f"{run} {of}" for run, of in ratio.items())
    lines.append(
        f"\nStep time against the run without it: {time}. On the CPU torch's profiler counts the peak of every step, "
        "and it looks at every op; `PeakCallback` alone costs as much as the callback with a budget of 100 %. The "
        "allocator of a card counts by itself."
    )
    return "\n".join(lines) + "\n"


def levers_page() -> str:
    """docs/levers_measured.md: how far down each set of levers goes, and the curves."""
    found = json.loads((RESULTS / "levers.json").read_text(encoding="utf-8"))
    parts = [
        "<!-- Written by docs/generate.py (`make docs`); do not edit. -->\n\n# Levers, measured\n",
        "This page shows how far each set of levers takes the peak down, and at what cost. All figures are from "
        "`python benchmarks/levers.py`. What the levers are is in [levers](levers.md) and [concepts](concepts.md).\n",
    ]
    if "floor" in found:
        floor = found["floor"]["result"]
        parts.append("## Measured: GPT-2 on the CPU\n")
        parts.append(
            f"The step is {floor['model']}'s: {floor['batch']} x {floor['seq']:,} tokens, full fine-tuning, fp32, "
            "dropout on. The gradients of an earlier micro-batch are there before the step. The activation peak is the "
            "allocator's count minus what was live before the step, so it holds none of their bytes. Each row is the "
            "plan of the lowest peak by one set of levers:\n"
        )
        parts += [
            "| levers | activation peak | of every block's | predicted peak off by | recompute, of the forward's FLOPs "
            "| step, of every block's | gradients |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in floor["rows"]:
            share = row["recompute_of_forward"]  # null: from before products in place were counted
            recompute = "not counted" if share is None else f"{share:.0%}"
            parts.append(
                f"| {row['levers']} | {row['activation_peak_bytes']:,} B | {row['of_every_block']:.2f} "
                f"| {row['predicted_off']:+.4%} "
                f"| {recompute} "
                f"| {row['seconds_of_every_block']:.2f} | {row['gradients']} |"
            )
    if "forecast" in found:
        wide = found["forecast"]["result"]
        parts.append("\n## Forecast: Llama-3-8B, 8,192 tokens\n")
        parts.append(
            f"The forecast is for {wide['model']}'s shape, {wide['method']}, {wide['batch']} x {wide['seq']:,} tokens "
            "and an H100's kernels. No GPU was used. Each row is the plan of the lowest peak by one set of levers, "
            "whatever it costs:\n"
        )
        parts += [
            "| levers | peak of the step | of every block's | recompute | slowdown, estimated | the peak is at |",
            "|---|---|---|---|---|---|",
        ]
        for row in wide["rows"]:
            parts.append(
                f"| {row['levers']} | {row['peak_bytes'] / 2**30:.2f} GiB | {row['of_every_block']:.2f} "
                f"| {row['recompute_of_forward']:.0%} | {row['slowdown_estimated']:.2f} x | {row['owner']} |"
            )
        parts.append("\nFor each lever of the last row, this is how much higher the peak would be without it:\n")
        parts += ["| lever | bytes | seconds, estimated | how |", "|---|---|---|---|"]
        for share in wide["shares"]:
            parts.append(
                f"| {share['lever'].replace('_', ' ')} | {share['bought_bytes'] / 2**30:.2f} GiB "
                f"| {share['seconds']:.2f} | {share['how']} |"
            )
    if "curves" in found:
        parts.append("\n## From keep-everything to the floor\n")
        parts.append(
            "The plans may use all levers, with an H100's kernels. The activation peak is a part of the unplanned one, "
            "the slowdown is estimated. The last column is the best of the smaller sets of levers at the same budget.\n"
        )
        for curve in found["curves"]["result"]:
            parts.append(f"### {curve['model']}, {curve['method']}, {curve['batch']} x {curve['seq']:,}\n")
            parts += [
                "| activation peak | slowdown | recompute | offloaded | sweeps | tiles | best smaller set |",
                "|---|---|---|---|---|---|---|",
            ]
            for point in curve["points"]:
                smaller = {name: value for name, value in point["smaller_sets"].items() if value is not None}
                name = min(smaller, key=smaller.__getitem__, default="")
                best = f"{smaller[name]:.4f} x ({name})" if name else "none fits"
                parts.append(
                    f"| {point['share']:.1%} | {point['slowdown_estimated']:.4f} x "
                    f"| {point['recompute_of_forward']:.0%} | {point['offloaded_bytes'] / 2**30:.2f} GiB "
                    f"| {point['sweeps'] or ''} | {'yes' if point['tiled'] else ''} | {best} |"
                )
            parts.append("")
    parts += _streamed_weights()
    parts += _whole_step_of_gpt2()
    return "\n".join(parts).rstrip() + "\n"


def _streamed_weights() -> list[str]:
    found = json.loads((RESULTS / "streaming.json").read_text(encoding="utf-8"))
    parts = ["\n## Measured: frozen weights streamed from host memory\n"]
    for case in found["cases"]:
        parts.append(
            f"A Llama shape of {case['blocks']} blocks and width {case['shape']['hidden_size']}, {case['method']}, "
            f"{case['batch']} x {case['seq']} tokens, AdamW, on the CPU, by `python benchmarks/streaming.py`. One "
            f"block's frozen weights take {case['block_bytes'] / 2**20:.2f} MiB. Without a plan the peak is "
            f"{case['plain_peak_bytes'] / 2**20:.1f} MiB. The peak is the highest of ten steps; the bits are those of "
            "losses, gradients, trained weights and optimizer state of all ten:\n"
        )
        parts += [
            "| budget | peak | predicted off by | frozen weights in host memory | resident | largest copy "
            "| seconds added, estimated | copied in a step | bits |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in case["rows"]:
            sizes = [row[name] / 2**20 for name in ("budget_bytes", "peak_bytes", "host_bytes", "resident_bytes")]
            budget, peak, host, resident = (f"{size:.1f} MiB" for size in sizes)
            parts.append(
                f"| {budget} | {peak} | {row['off']:+.4%} | {host} | {resident} "
                f"| {row['largest_copy_bytes'] / 2**20:.2f} MiB | {row['added_seconds']:.4f} "
                f"| {row['copied_bytes'] / 2**20:.1f} MiB | {'identical' if row['identical'] else 'differ'} |"
            )
        parts.append("")
    return parts


_GPT2_PARTS = {
    "share": "60 % of the plain peak",
    "device": "the least with the state on the device",
    "host": "the least with the state in host memory",
}


def _whole_step_of_gpt2() -> list[str]:
    rows = json.loads((RESULTS / "gpt2_bars.json").read_text(encoding="utf-8"))["rows"]
    trained = next(row for row in rows if row["part"] == "train")
    stepped = [row for row in rows if row["part"] in _GPT2_PARTS]
    tied = stepped[0]["tied_gradient_bytes"] / (stepped[0]["parameters_bytes"] + stepped[0]["optimizer_state_bytes"])
    parts = [
        "\n## Measured: the whole step of GPT-2, 124 million parameters\n",
        "Full fine-tuning in fp32 with AdamW, dropout on, random weights and real text, on the CPU, by `python "
        "benchmarks/gpt2_bars.py`. The peak is the highest of ten steps; the bits are those of losses, weights and "
        "optimizer state after them:\n",
        "| batch | budget | peak | of the plain peak | of weights and state | predicted off by | levers | bits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in stepped:
        same = row["losses_identical"] and row["weights_and_state_identical"]
        parts.append(
            f"| {row['batch']} x {row['seq']} | {_GPT2_PARTS[row['part']]} | {row['peak_bytes'] / 2**20:,.0f} MiB "
            f"| {row['of_plain']:.1%} | {row['of_weights_and_state']:.3f} | {row['off']:+.4%} "
            f"| {', '.join(row['levers'])} | {'identical' if same else 'differ'} |"
        )
    resumed = ", ".join(map(str, trained["resumed_at"]))
    parts.append(
        f"\nThe gradient of the tied embedding alone is {tied:.1%} of weights and state, so a step that holds it whole "
        f"takes at least {1 + tied:.3f} of them. While its two parts are summed it is there twice, which makes "
        f"{1 + 2 * tied:.3f}.\n\n"
        f"`tightfit train` fine-tuned the same model at {trained['budget_bytes'] / 2**20:,.0f} MiB, half of the plain "
        "peak, where plans of activations alone are refused. It was killed (SIGKILL) and went on after step "
        f"{resumed}. The losses of its {trained['steps']} steps are "
        f"{'' if trained['losses_identical'] else 'not '}those of steps without a plan, bit for bit; the highest peak "
        f"was {trained['peak_bytes'] / 2**20:,.0f} MiB.\n"
    )
    return parts


def several_gpus_page() -> str:
    """docs/several_gpus_measured.md: ranks against the forecast and accelerate, and tables for many GPUs."""
    found = json.loads((RESULTS / "several_gpus.json").read_text(encoding="utf-8"))
    parts = [
        "<!-- Written by docs/generate.py (`make docs`); do not edit. -->\n\n# Several GPUs, measured\n",
        "All figures are from `python benchmarks/several_gpus.py`. [Several GPUs](how_to/several_gpus.md) says how to "
        "use tightfit there.\n",
    ]
    if "measured" in found:
        rows = found["measured"]["result"]
        parts += [
            "## Measured: processes on gloo\n",
            "The model is a small Llama with attention dropout in fp32, on a two-core CPU. The peak is that of the "
            "rank that holds most, by the allocator's own count. The forecast is made in one process with fake "
            "collectives. The steps were timed side by side in one run. There are more processes than cores, so the "
            "ratios say little about GPUs. The gradient's error is against the same ranks without checkpointing; 0 "
            "means bit for bit.\n",
            "| ranks | how | | peak of a rank | forecast | off by | step | gradient error |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            highest, said = max(row["peak_bytes"]), row["forecast_bytes"]
            off = f"{said / highest - 1:+.2%}" if said else ""
            parts.append(
                f"| {row['world']} | {row['case']} | {row['mode']} | {highest:,} B | {f'{said:,} B' if said else ''} "
                f"| {off} | {row['step_ratio']:.2f} | {row['gradient_error']:.2g} |"
            )
        wrong = [row for row in rows if row["mode"].startswith("accelerate") and row["gradient_error"]]
        if wrong:
            parts.append(
                f"\nIn {len(wrong)} of {sum(row['mode'].startswith('accelerate') for row in rows)} rows accelerate's "
                "checkpointing gives other gradients. It does not restore the random state, so the recompute draws "
                "another dropout mask.\n"
            )
    if "scale" in found:
        parts += [
            "\n## Forecast: from 8 to 1,024 H100s\n",
            "The step of a rank has 1 x 4,096 tokens in bf16, with AdamW. The peak is that of the plan if one fits, "
            "and otherwise the lowest that any plan reaches. Communication is what a rank receives and sends over an "
            "assumed link: 450 GB/s within a node of eight, 50 GB/s a GPU between nodes. FSDP2 overlaps it with the "
            "compute, so a step takes at least the larger of the two. `--no-reshard` keeps the gathered weights until "
            "backward: it gathers half as much, and costs the bytes of all weights.\n",
            "| model | how | GPUs | without a plan | every block | plan | recompute | compute | communication "
            "| planned in |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in found["scale"]["result"]:
            how = f"{row['method']}, {row['strategy']}" + ("" if row["reshard"] else ", weights kept")
            made = "planned_bytes" in row
            recompute = f"{row['recompute_of_forward']:.0%}" if made else ""
            peak = f"{row['planned_bytes' if made else 'least_bytes'] / 2**30:.1f} GiB" + ("" if made else ": too much")
            world = "any" if row["strategy"] == "ddp" else f"{row['world']:,}"
            parts.append(
                f"| {row['model']} | {how} | {world} | {row['none_bytes'] / 2**30:.1f} GiB "
                f"| {row['every_block_bytes'] / 2**30:.1f} GiB | {peak} "
                f"| {recompute} | {row['compute_seconds']:.2f} s "
                f"| {row['communication_seconds']:.2f} s | {row['all_seconds']:.0f} s |"
            )
    return "\n".join(parts).rstrip() + "\n"


def gpu_page() -> str:
    """docs/gpu.md: public tables, what was forecast for them, and what a card measured, where one did."""
    registered = _read("gpu_predictions")
    measured = _of_a_card()
    dates = sorted(table["date"][:10] for table in registered.values())
    one = next(iter(registered.values()))
    versions, card = one["environment"], one["card"]
    parts = [
        "<!-- Written by docs/generate.py (`make docs`); do not edit. -->\n\n# GPU: published, forecast, measured\n",
        _said_of_card(measured),
        f"The forecasts were registered on {dates[0]}"
        + (f" to {dates[-1]}" if dates[-1] != dates[0] else "")
        + f" with torch {versions['torch']}, transformers {versions['transformers']} and the kernels of `{card}` "
        "(`benchmarks/gpu/predict.py`), before any card was seen; `benchmarks/results/gpu_predictions.json` has the "
        "commit of each. The published figures are others' own, measured by them. The kit that measures the same "
        "cases is `benchmarks/gpu/`, and its README says how to run it.\n",
        "Each cell is allocated / reserved: what tensors take at the peak, and what the allocator has taken from the "
        "driver by then. *Every block* is the usual checkpointing. *Least* is the lowest peak that tightfit finds: "
        "with levers that give the same bits, and with tiles. It recomputes more than a plan for a budget would. "
        "*Step in backward* lets the optimizer step there, which not every training loop allows.\n",
        "## What a card has run\n",
        "These are the steps of the kit. Other pages link to this table where a claim waits for a card.\n",
        kit_part(),
        "## Which figures are from a card\n",
        "| where | figures | from |",
        "|---|---|---|",
        *(f"| {where} | {what} | {origin} |" for where, what, origin in _figures(measured)),
    ]
    for name, table in registered.items():
        parts.append(f"\n## {name}: {table['title']}\n")
        if table["source"]:
            address, _, where = table["source"].partition(" ")
            parts.append(f"Published in <{address}>{f' {where}' if where else ''}.\n")
        parts += [f"- {each}" for each in table["assumed"]]
        parts.append("")
        parts += _longest_rows(table) if name == "D" else _peak_rows(name, table)
        parts += _measured_rows(name, measured)
    return "\n".join(parts).rstrip() + "\n"


def _of_a_card() -> dict[str, Any] | None:
    """What a card measured; None where none did."""
    file = RESULTS / "gpu_measured.json"
    if not file.exists():
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if found["is_dry"]:
        raise SystemExit(f"{file}: a dry run is no measurement; put there what a card has measured")
    return found


def _said_of_card(measured: dict[str, Any] | None) -> str:
    if measured is None:
        return "**No card has run tightfit yet.** Every figure of tightfit on this page is a forecast.\n"
    rows = measured["steps"].get("environment", {}).get("rows", [])
    facts = next((row["facts"] for row in rows if "facts" in row), {})
    torch = facts.get("environment", {}).get("torch") or measured.get("torch") or "of an unknown version"
    return (
        f"One card has run tightfit: {facts.get('name', 'its name was not recorded')}, on {measured['date'][:10]}, "
        f"with torch {torch}, at commit {measured['commit'] or 'unknown'}. What it measured stands below "
        "each table.\n"
    )


def kit_part() -> str:
    """The steps of the kit for a card: the seconds that each is sure of, what it answers, and what came of it."""
    spec = importlib.util.spec_from_file_location("gpu_kit_run", KIT / "run.py")
    assert spec is not None and spec.loader is not None
    kit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kit)  # it imports nothing that is not Python's own
    measured = (_of_a_card() or {}).get("steps", {})
    answers = _kit_answers()
    lines = ["| step | seconds | what it answers | on a card |", "|---|---|---|---|"]
    for name, limit in kit.LIMITS.items():
        done = measured.get(name)
        came = "not run" if done is None else done.get("outcome", "cut off")
        if done is not None and (failed := sum(map(kit.has_failed, done["rows"]))):
            came += f"; {failed} of {len(done['rows'])} rows failed"
        lines.append(f"| `{name}` | {limit:.0f} | {answers[name]} | {came} |")
    return "\n".join(lines) + (
        f"\n\nThe limits add up to {sum(kit.LIMITS.values()):.0f} s. With {kit.START_SECONDS} s for the start and for "
        f"ending steps that hang they are within the {kit.ALL_SECONDS} s of a call, so every step is sure of its own. "
        f"What a step leaves over is there for later ones, up to {kit.MOST_TIMES} times their limit. The last one "
        "takes all that is left.\n"
    )


def _kit_answers() -> dict[str, str]:
    """What each step says of itself, read from the source, so that torch need not be there."""
    said, steps = {}, {}
    for file in ("steps.py", "memory.py"):
        for node in ast.parse((KIT / file).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                said[node.name] = " ".join((ast.get_docstring(node) or "").split()).rstrip(".")
            elif isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "STEPS":
                assert isinstance(node.value, ast.Dict)
                steps = {ast.literal_eval(k): ast.unparse(v) for k, v in zip(node.value.keys, node.value.values) if k}
    return {name: said[function] for name, function in steps.items()}


def _figures(measured: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    card = "forecast; not measured yet" if measured is None else "forecast, and measured on a card"
    return [
        ("README, [peers](peers.md), [architectures](zoo.md), [traps](traps.md), [switches](switches.md)",
         "peaks, FLOPs, gradients, seconds", "measured on a CPU"),
        ("[torch.compile](how_to/compile.md)", "peaks, FLOPs, gradients", "measured on a CPU"),
        ("[levers](levers_measured.md)", "its tables of small models; of large ones",
         "measured on a CPU; forecast for a card"),
        ("[the forecast](forecast.md)", "how far it is off; from GPT-2 to 70B",
         "measured on a CPU; forecast for a card"),
        ("[several GPUs](several_gpus_measured.md)", "processes on gloo; from 8 to 1,024 H100s",
         "measured on a CPU; forecast for cards"),
        ("this page", "tables A to D and S", card),
    ]  # fmt: skip


#: The modes of the tables by the names that `benchmarks/gpu/cases.py` gives them, and as the page says them.
GPU_MODES = {
    "none": "no checkpointing",
    "every-block": "every block",
    "tightfit, least, exact": "least, exact",
    "tightfit, least, exact, step in backward": "least, exact, step in backward",
    "tightfit, least, tiles": "least, tiles",
    "tightfit, 60%": "tightfit, 60 %",
}


def _peak_rows(name: str, table: dict[str, Any]) -> Iterator[str]:
    unit, said = (2**30, "GiB") if name == "C" else (1e9, "GB")
    modes = [mode for mode in GPU_MODES if any(mode in row["modes"] for row in table["rows"])]
    published = any(row["published_bytes"] for row in table["rows"])
    yield _row(["case", *([f"published, {said}"] * published), *(f"{GPU_MODES[mode]}, {said}" for mode in modes)])
    yield "|---" * (1 + published + len(modes)) + "|"
    for row in table["rows"]:
        theirs = "; ".join(f"{who}: {size / unit:.4g}" for who, size in row["published_bytes"].items())
        cells = [
            " / ".join(f"{found[key] / unit:.2f}" for key in ("allocated_bytes", "reserved_bytes") if key in found)
            for found in (row["modes"].get(mode, {}) for mode in modes)
        ]
        yield _row([row["case"], *([theirs] * published), *cells])
    yield from _against_published(name, table)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _against_published(name: str, table: dict[str, Any]) -> Iterator[str]:
    """How far the row that matches a published figure is from it."""
    matching = {
        "A": ("FlashAttention-2", "every-block", "reserved_bytes"),
        "B": ("LitGPT", "none", "allocated_bytes"),
        "C": ("plain", "none", "allocated_bytes"),
    }
    if name not in matching:
        return
    who, mode, key = matching[name]
    off = [
        row["modes"][mode][key] / row["published_bytes"][who] - 1
        for row in table["rows"]
        if who in row["published_bytes"]
    ]
    within = f"{min(off):+.0%} to {max(off):+.0%}" if len(off) > 1 else f"{off[0]:+.1%}"
    yield (
        f"\nThe forecast of {GPU_MODES[mode]} ({key.removesuffix('_bytes')}) is {within} against the published "
        f"*{who}*. The programs and the cards are not the same, so this says how near the two are and not how far the "
        "forecast is off."
    )


def _longest_rows(table: dict[str, Any]) -> Iterator[str]:
    modes = [mode for mode in GPU_MODES if mode in table["rows"][0]["modes"]]
    who = list(table["rows"][0]["published_tokens"])
    yield f"| card | {who[0]}, published | " + " | ".join(GPU_MODES[m] for m in modes) + f" | {who[1]}, published |"
    yield "|---" * (3 + len(modes)) + "|"
    for row in table["rows"]:
        found = [row["modes"][mode] for mode in modes]
        # what a later registration did not look for again says so
        tokens = [f"{each['tokens']:,}" + ("\\*" if "registered" in each else "") for each in found]
        theirs = row["published_tokens"]
        yield (
            f"| {row['card_gib']} GB | {theirs[who[0]]:,} | " + " | ".join(tokens)
            + f" | {theirs[who[1]]:,} |"
        )  # fmt: skip
    kept = {each["registered"] for row in table["rows"] for each in row["modes"].values() if "registered" in each}
    yield from (f"\n\\* Registered {each}." for each in sorted(kept))
    least = [
        (row["modes"][modes[1]]["tokens"], *(row["published_tokens"][each] for each in who)) for row in table["rows"]
    ]
    ratios = [(exact / first, exact / second) for exact, first, second in least]
    tiled = [row["modes"][modes[2]]["tokens"] / row["published_tokens"][who[1]] for row in table["rows"]]
    yield (
        f"\nWith exact levers the forecast is {min(r for r, _ in ratios):.1f} to {max(r for r, _ in ratios):.1f} times "
        f"the context of {who[0]}, and {min(r for _, r in ratios):.2f} to {max(r for _, r in ratios):.2f} of that of "
        f"{who[1]}. With tiles, which do not give the same bits, it is {min(tiled):.2f} to {max(tiled):.2f} of it. "
        f"{who[1]} moves activations to host memory; these plans use none."
    )


def _measured_rows(name: str, measured: dict[str, Any] | None) -> Iterator[str]:
    rows = ((measured or {}).get("steps", {}).get(f"memory-{name}") or {"rows": []})["rows"]
    if not rows:
        return
    yield "\n| case | way | forecast, allocated / reserved | measured | off by |"
    yield "|---|---|---|---|---|"
    last = {(row.get("case", ""), row.get("mode", "")): row for row in rows}  # of what was run again, the last counts
    for (case, mode), row in last.items():
        way, found = GPU_MODES.get(mode, mode), row.get("measured") or {}
        said = row.get("forecast") or {}
        if "allocated_bytes" not in found:
            why = row.get("skipped") or row.get("failed") or row.get("error") or found.get("failed", "")
            yield f"| {case} | {way} | | {why.replace('|', '/')} | |"
            continue
        pairs = [
            " / ".join(
                f"{each[key] / 1e9:.2f} GB" if each.get(key) is not None else ""
                for key in ("allocated_bytes", "reserved_bytes")
            )
            for each in (said, found)
        ]
        off = " / ".join(f"{each:+.1%}" for each in row.get("off_by", {}).values())
        yield f"| {case} | {way} | {pairs[0]} | {pairs[1]} | {off} |"


# ---------------------------------------------------------------------------------------- measured parts

KINDS_OF_PEERS = {
    "peers-blocks": ("every ", "checkpoint_sequential", "transformers"),
    "peers-selective": ("selective",),
    "peers-remat": ("torch_remat",),
    "peers-compiler": ("torch's partitioner",),
}


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def _range(rows: list[dict[str, Any]], key: str, form: str) -> str:
    found = sorted(row[key] for row in rows if key in row)
    if not found:
        return ""
    low, high = format(found[0], form), format(found[-1], form)
    return low if low == high else f"{low} to {high}"


def peers_of(kind: str) -> str:
    """What one kind of peer does and what tightfit does in the same peak: all of its settings, lost ones too."""
    rows = [row for row in _compared(_read("peers")) if row["peer"].startswith(KINDS_OF_PEERS[kind])]
    lost = [row for row in rows if row["extra_flops"] > row["peer_extra_flops"] + 1e-6]
    nothing = [row for row in rows if row["peer_peak"] >= 1]
    other = [row["peer_gradients"] for row in rows if row["peer_gradients"] != "identical"]
    lines = [
        f"There are {len(rows)} comparisons on {', '.join(dict.fromkeys(row['model'] for row in rows))}. At the same "
        f"peak tightfit reruns more than the peer in {len(lost)} of them"
        + (f" ({'; '.join(_in_words(row) for row in lost)})" if lost else "")
        + f". The peer's peak is above that of no checkpointing at all in {len(nothing)}. "
        + (
            f"The peer's gradients differ from the plain step's in {len(other)} (relative error up to "
            f"{max(other):.1g}; "
            f"{', '.join(dict.fromkeys(row['model'] for row in rows if row['peer_gradients'] != 'identical'))})."
            if other
            else "The peer's gradients are the plain step's in all of them."
        ),
        "",
        "| setting | its peak | its extra | tightfit's extra | its time | tightfit's time |",
        "|---|---|---|---|---|---|",
    ]
    for peer in dict.fromkeys(row["peer"] for row in rows):
        mine = [row for row in rows if row["peer"] == peer]
        lines.append(
            f"| {peer} | {_range(mine, 'peer_peak', '.2f')} | {_range(mine, 'peer_extra_flops', '.1%')} "
            f"| {_range(mine, 'extra_flops', '.1%')} | {_range(mine, 'peer_time', '.2f')} "
            f"| {_range(mine, 'time', '.2f')} |"
        )
    return "\n".join(lines) + "\n"


def _in_words(row: dict[str, Any]) -> str:
    return (
        f"{row['model']}, {row['seq']}, {row['peer']}: {row['extra_flops']:.1%} against {row['peer_extra_flops']:.1%}"
    )


def timeline_part() -> str:
    """The pictures of `benchmarks/timeline.py`, with their figures in words."""
    found = _read("timeline")
    points = {point["name"]: point for point in found["points"]}
    peak = points["none"]["peak_bytes"]
    off = max(abs(points[n]["measured_bytes"] / points[n]["peak_bytes"] - 1) for n in ("none", "chosen"))

    def told(name: str) -> str:
        point = points[name]
        return (
            f"{point['measured_bytes'] / 2**30:.2f} GiB ({point['measured_bytes'] / peak:.0%}), "
            f"{point['measured_recompute_share']:.0%} of the forward's FLOPs run again"
        )

    return (
        f"One step of {found['model']} ({found['batch']} x {found['seq']} tokens, full fine-tuning, AdamW, fp32), "
        "drawn from its trace (`benchmarks/timeline.py`). On the left there is no checkpointing: what autograd saves "
        "grows during the forward and is freed during the backward, and logits and loss are on top of it. In the "
        "middle each block keeps only its input. On the right a plan keeps what fits.\n\n"
        "![live bytes through one step: no checkpointing, nothing kept in any block, a plan](timeline.png)\n\n"
        "Each panel shows, from left to right, the forward, the loss, the backward and the optimizer's step. The same "
        "three steps were measured by the allocator's own count:\n\n"
        f"- no checkpointing: {told('none')};\n"
        f"- every block (`torch.utils.checkpoint`): {told('every-block')};\n"
        f"- a plan for 60 %: {told('chosen')}.\n\n"
        f"The left and the right panel are drawn within {off:.5%} of what was measured. The middle panel is a plan of "
        "tightfit, which reruns only what backward needs, when backward needs it. torch's own checkpointing, as "
        "measured, holds and reruns more.\n\n"
        "The next picture shows the whole trade-off. Each budget is a point on the curve from keeping everything to "
        "the lowest peak. Every-block checkpointing lies above the curve. The distance is recompute that saves no "
        "bytes.\n\n"
        "![peak against recompute of the same step](tradeoff.png)\n"
    )


def page_part() -> str:
    """`benchmarks/page.py`: how large the page of a deep model is, and how soon it answers."""
    found = _read("page")
    ready = max(row["ready_ms"] for row in found["loads"])
    key = max(ms for row in found["loads"] for ms in row["key_ms"])
    return (
        f"The page of {found['model']} with LoRA (32 layers, {found['seq']:,} tokens) is "
        f"{found['page_bytes'] / 1e6:.2f} MB. It was loaded {len(found['loads'])} times by {found['browser']} on 2 CPU "
        f"cores, beside other work (load {found['load_average_at_start']:.0f}). It was drawn and ready after at most "
        f"{ready / 1e3:.2f} s. Every place of the slider was drawn within {key / 1e3:.2f} s (`benchmarks/page.py`).\n\n"
        "![milliseconds until the page is ready, and from the slider to the next frame](../page.png)"
    )


def gpt2_part() -> str:
    return _measured_table("gpt2", _read("measure_gpt2"))


def compiled_part() -> str:
    """`benchmarks/compiled.py`: the compiler's own budget, and a plan in the same measured peak."""
    found = _read("compiled")
    parts = []
    for case in found["cases"]:
        alone = case["rows"][0]
        whole = case["step_flops"]
        parts.append(
            f"{case['model'].replace('_', ' ')}, {case['batch']} x {case['seq']} tokens, `{case['backend']}`; peak "
            f"uncompiled {case['uncompiled_peak_bytes']:,} B, compiled {alone['peak_bytes']:,} B:\n"
        )
        lines = [
            "| budget | its peak | its extra | ops again | dropout "
            "| tightfit's peak | its extra | ops again | dropout |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        mine = {row["against"]: row for row in case["rows"] if row["mode"] == "tightfit"}
        for row in case["rows"]:
            if row["mode"] != "activation_memory_budget":
                continue
            lines.append(
                f"| {row['value']} | {_compiled_cells(row, whole)} | {_compiled_cells(mine[row['value']], whole)} |"
            )
        parts.append("\n".join(lines) + "\n")
    pairs = [
        (theirs, mine)
        for case in found["cases"]
        for theirs in case["rows"]
        for mine in case["rows"]
        if theirs.get("value", -1) == mine.get("against", -2) and not mine.get("infeasible")
    ]
    less = sum(mine["recompute_flops"] < theirs["recompute_flops"] for theirs, mine in pairs)
    more = sum(mine["recompute_flops"] > theirs["recompute_flops"] for theirs, mine in pairs)
    wrong = sum(theirs["dropout"] == "wrong" for theirs, _ in pairs)
    parts.append(
        f"Within the same peak tightfit recomputes less than the compiler's own budget in {less} of {len(pairs)} "
        f"cases, and more in {more}. The compiler's own budget gives wrong gradients in {wrong} cases.\n"
    )
    proofs = [row["proof"] for case in found["cases"] for row in case["rows"] if "proof" in row]
    passed = sum(all(proof.values()) for proof in proofs)
    parts.append(
        "*Extra* is the FLOPs of the compiler's two graphs beyond those without a budget, as a part of the step's. "
        "*Ops again* counts the forward's ops that are in the backward graph too. `tightfit.verify` passed on "
        f"{passed} of {len(proofs)} plans.\n"
    )
    return "\n".join(parts)


def _compiled_cells(row: dict[str, Any], whole: int) -> str:
    if row.get("infeasible"):
        return f"least found {row['least_bytes']:,} B | | |"
    dropout = (
        row["dropout"] if row["dropout"] != "wrong" else f"**wrong**, gradients off by {row['gradient_error']:.2g}"
    )
    return f"{row['peak_bytes']:,} B | {row['recompute_flops'] / whole:.1%} | {row['recomputed_ops']} | {dropout}"


# -------------------------------------------------------------------------------------------- the packages

#: What stands in a package's box under its name.
IN_A_WORD = {
    "core": "the nouns",
    "catalog": "GPUs and model shapes",
    "device": "what a device costs",
    "accelerator": "asks torch",
    "step": "one training step",
    "levers": "what a plan may do",
    "plan": "decides what is kept",
    "report": "text, JSON, pages",
    "trace": "records a step",
    "engine": "carries out a plan",
    "verify": "proves a plan",
    "fitting": "fit, enable",
    "tightfit": "the public names",
    "integrations": "one file per framework",
    "forecast": "will it run?",
    "train": "tightfit train",
    "doctor": "the known traps",
    "cli": "the command line",
}


@dataclass(frozen=True)
class Packages:
    """The packages of `src/tightfit` and who imports whom, from every import statement in them.

    `__init__.py` of tightfit itself is the package `tightfit`, and `__main__.py` belongs to `cli`.
    """

    imports: dict[str, frozenset[str]]  # what each imports of the others, wherever the statement stands
    at_once: dict[str, frozenset[str]]  # the part of it that is imported when a module is loaded
    torch: dict[str, str]  # "none" of its modules loads torch when it is imported, "some" do, or "all" do
    said: dict[str, str]  # the first sentence of its docstring

    @classmethod
    def read(cls) -> Packages:
        source = ROOT / "src" / "tightfit"
        modules = {}
        for path in sorted(source.rglob("*.py")):
            parts = path.relative_to(source).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            modules[".".join(("tightfit", *parts))] = ast.parse(path.read_text(encoding="utf-8"))
        imports: dict[str, set[str]] = {_package(module): set() for module in modules}
        at_once: dict[str, set[str]] = {package: set() for package in imports}
        needs: dict[str, set[str]] = {}  # by module: modules that are loaded with it, and torch
        for module, tree in modules.items():
            needs[module] = {".".join(module.split(".")[:n]) for n in range(1, module.count(".") + 1)}
            for name, is_at_once in _imports(tree):
                target = name if name in modules else name.rpartition(".")[0]
                if target in modules:
                    imports[_package(module)].add(_package(target))
                if is_at_once:
                    needs[module].add("torch" if name.partition(".")[0] == "torch" else target)
                    if target in modules:
                        at_once[_package(module)].add(_package(target))
        torch: dict[str, str] = {}
        for package in imports:
            own = [module for module in modules if _package(module) == package]
            inner = [module for module in own if module != f"tightfit.{package}"]  # not the face, where there is more
            loads = [_reaches(module, needs, "torch") for module in inner or own]
            torch[package] = "all" if all(loads) else "some" if any(loads) else "none"
        said = {}
        for package in imports:
            face = modules["tightfit" if package == "tightfit" else f"tightfit.{package}"]
            said[package] = re.split(r"(?<=[.;])\s", " ".join((ast.get_docstring(face) or "").split()))[0]
        return cls(
            imports={package: frozenset(found - {package}) for package, found in imports.items()},
            at_once={package: frozenset(found - {package}) for package, found in at_once.items()},
            torch=torch,
            said=said,
        )

    def rows(self) -> list[list[str]]:
        """The packages in layers, from the bottom: each as low as what it imports allows. Refuses a circle."""
        row: dict[str, int] = {}
        while len(row) < len(self.imports):
            ready = sorted(p for p, found in self.imports.items() if p not in row and found <= row.keys())
            if not ready:
                left = ", ".join(sorted(self.imports.keys() - row.keys()))
                raise SystemExit(f"packages import one another in a circle: it is among {left}")
            row |= {package: 1 + max((row[each] for each in self.imports[package]), default=-1) for package in ready}
        return [sorted(p for p in row if row[p] == height) for height in range(max(row.values()) + 1)]

    def arrows(self) -> list[tuple[str, str]]:
        """Who imports whom, without what follows from other arrows."""
        below: dict[str, set[str]] = {}
        for row in self.rows():
            for package in row:
                below[package] = set().union(*({each} | below[each] for each in self.imports[package]))
        return sorted(
            (package, target)
            for package, found in self.imports.items()
            for target in found
            if not any(target in below[other] for other in found)
        )


def _package(module: str) -> str:
    parts = module.split(".")
    return "tightfit" if len(parts) == 1 else "cli" if parts[1] == "__main__" else parts[1]


def _imports(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """(dotted name, is it imported when the module is loaded?) of every import statement; those are all absolute."""
    pending: list[tuple[ast.AST, bool]] = [(tree, True)]
    while pending:
        node, at_once = pending.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_once) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", at_once) for alias in node.names)
        later = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        )
        pending += [(child, at_once and not later) for child in ast.iter_child_nodes(node)]


def _reaches(module: str, needs: dict[str, set[str]], wanted: str) -> bool:
    seen: set[str] = set()
    pending = [module]
    while pending:
        each = pending.pop()
        if each not in seen:
            seen.add(each)
            pending += needs.get(each, ())
    return wanted in seen


def packages_part() -> str:
    """architecture.md's table: one line for each package, from the bottom."""
    packages = Packages.read()
    lines = ["| package | what it is | imports | torch |", "|---|---|---|---|"]
    order = [package for row in packages.rows() for package in row]
    needed = {"none": "no", "some": "in part", "all": "yes"}
    for package in order:
        found = ", ".join(f"`{each}`" for each in order if each in packages.imports[package])
        said = packages.said[package].rstrip(".;")
        name = f"`{package}`"
        if package == "tightfit":
            name, said = "`tightfit` itself", "The public names; what needs torch is loaded when it is first used"
        lines.append(f"| {name} | {said} | {found or 'nothing'} | {needed[packages.torch[package]]} |")
    return "\n".join(lines) + "\n"


#: Sizes of the drawing in pixels. Names are set in a typeface of fixed width, 0.6 of its size for each letter.
BOX_WIDTH, BOX_HEIGHT, GAP, GUTTER, MARGIN = 190, 46, 34, 50, 46
NAME_SIZE, WORD_SIZE = 15, 12
FILLS = {"none": "#dff0e3", "some": "#fdf3d6", "all": "#e4e9f7"}
LEGEND = (("none", "needs no torch"), ("some", "in part"), ("all", "needs torch"))


def architecture_svg() -> str:
    """docs/architecture.svg: the packages in layers, with arrows down to what they import."""
    packages = Packages.read()
    if unnamed := sorted(packages.imports.keys() ^ IN_A_WORD.keys()):
        raise SystemExit(f"IN_A_WORD in docs/generate.py and the packages of src/tightfit differ: {', '.join(unnamed)}")
    rows = packages.rows()
    columns = max(3, *(len(row) for row in rows))
    width = 2 * MARGIN + columns * BOX_WIDTH + (columns - 1) * GUTTER
    top = 76
    height = top + len(rows) * BOX_HEIGHT + (len(rows) - 1) * GAP + 20
    boxes: dict[str, tuple[int, int]] = {}  # left and upper edge
    for place, row in enumerate(rows):
        upper = top + (len(rows) - 1 - place) * (BOX_HEIGHT + GAP)
        spread = {1: [(columns - 1) / 2], 2: [0, columns - 1]}.get(len(row), list(range(columns)))
        for package, column in zip(row, spread, strict=False):
            boxes[package] = (MARGIN + round(column * (BOX_WIDTH + GUTTER)), upper)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img" aria-label="The packages of tightfit in layers, with arrows down to what they import">',
        "<!-- Written by docs/generate.py (`make docs`) from the imports of src/tightfit; do not edit. -->",
        f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>',
    ]
    for place, (kind, said) in enumerate(LEGEND):
        left = MARGIN + place * (BOX_WIDTH + GUTTER)
        parts.append(f'<rect x="{left}" y="14" width="16" height="16" rx="3" fill="{FILLS[kind]}" stroke="#8a93a3"/>')
        parts.append(_text(left + 24, 27, said, WORD_SIZE, anchor="start"))
    for place, (dashed, said) in enumerate(
        ((False, "imports when it is loaded"), (True, "imports only when it has to"))
    ):
        left = MARGIN + place * (BOX_WIDTH + GUTTER)
        parts.append(_arrow([(left, 48), (left + 26, 48)], dashed=dashed))
        parts.append(_text(left + 34, 52, said, WORD_SIZE, anchor="start"))
    for package, target in packages.arrows():
        route = _route(boxes, package, target, width)
        parts.append(_arrow(route, dashed=target not in packages.at_once[package]))
    for package in (package for row in rows for package in row):
        left, upper = boxes[package]
        parts.append(
            f'<rect x="{left}" y="{upper}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6" '
            f'fill="{FILLS[packages.torch[package]]}" stroke="#5b6472"/>'
        )
        for text, size, below in ((package, NAME_SIZE, 20), (IN_A_WORD[package], WORD_SIZE, 37)):
            if len(text) * size * 0.6 > BOX_WIDTH - 12:
                raise SystemExit(f"{text!r} is too long for its box in docs/architecture.svg: say it in fewer words")
            parts.append(_text(left + BOX_WIDTH // 2, upper + below, text, size, bold=size == NAME_SIZE))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _arrow(points: list[tuple[int, int]], *, dashed: bool) -> str:
    (x, y), (tip_x, tip_y) = points[-2:]
    length = math.hypot(tip_x - x, tip_y - y)
    along, across = (tip_x - x) / length, (tip_y - y) / length
    wings = [
        f"{tip_x - 8 * along - 4 * side * across:.1f} {tip_y - 8 * across + 4 * side * along:.1f}" for side in (1, -1)
    ]
    line = "M" + " L".join(f"{x} {y}" for x, y in points)
    dashes = ' stroke-dasharray="5 4"' if dashed else ""
    return (
        f'<path d="{line}" fill="none" stroke="#5b6472" stroke-width="1.4"{dashes}/>'
        f'<path d="M{tip_x} {tip_y} L{wings[0]} L{wings[1]} z" fill="#5b6472"/>'
    )


def _text(x: int, y: int, text: str, size: int, *, bold: bool = False, anchor: str = "middle") -> str:
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x}" y="{y}" font-family="monospace" font-size="{size}"{weight} text-anchor="{anchor}" '
        f'fill="#1c222b">{html.escape(text)}</text>'
    )


def _route(boxes: dict[str, tuple[int, int]], package: str, target: str, width: int) -> list[tuple[int, int]]:
    """Points of the line from one box down to another: straight, or around what stands in between by a gutter."""
    (left, upper), (to_left, to_upper) = boxes[package], boxes[target]
    # lines that leave or meet a box in the same place are told apart by the side on which their other end lies
    side = (to_left > left) - (to_left < left)
    start = (left + BOX_WIDTH // 2 + side * 30, upper + BOX_HEIGHT)
    end = (to_left + BOX_WIDTH // 2 - side * 30, to_upper)
    between = [box for name, box in boxes.items() if name not in (package, target) and upper < box[1] < to_upper]
    if not any(_crosses(start, end, box) for box in between):
        return [start, end]
    lanes = range(MARGIN - GUTTER // 2, width, BOX_WIDTH + GUTTER)
    x = min(lanes, key=lambda lane: (abs(lane - start[0]) + abs(lane - end[0]), lane))
    first, last = start[1] + GAP // 2, end[1] - GAP // 2
    return [start, (x, first), (x, last), end]


def _crosses(start: tuple[int, int], end: tuple[int, int], box: tuple[int, int]) -> bool:
    """Does the line go through the box, or nearer to it than 8 pixels?"""
    for y in range(box[1] - 8, box[1] + BOX_HEIGHT + 9):
        x = start[0] + (end[0] - start[0]) * (y - start[1]) / (end[1] - start[1])
        if box[0] - 8 <= x <= box[0] + BOX_WIDTH + 8:
            return True
    return False


def results_part() -> str:
    """When each results file was drawn, and whether the code that it measures has changed since."""
    if (place := str(RESULTS.parent)) not in sys.path:
        sys.path.append(place)
    import drawn

    table: str = drawn.table()
    return table


#: Measured and generated parts by the name that a page gives them.
PARTS: dict[str, Callable[[], str]] = {
    "packages": packages_part,
    "results": results_part,
    "kit": kit_part,
    "compiled": compiled_part,
    "evidence": evidence,
    "readme": measured,
    "gpt2": gpt2_part,
    "timeline": timeline_part,
    "page": page_part,
    **{kind: (lambda kind=kind: peers_of(kind)) for kind in KINDS_OF_PEERS},
}


def with_measured(path: Path) -> str:
    """A page with its measured parts written anew."""

    def part(match: re.Match[str]) -> str:
        if match["name"] not in PARTS:
            raise SystemExit(f"{path}: no measured part is called {match['name']!r}; there are {', '.join(PARTS)}")
        return f"{match[1]}\n{PARTS[match['name']]()}\n{match[4]}"

    text = path.read_text(encoding="utf-8")
    written, count = MEASURED.subn(part, text)
    ends = text.count("<!-- measured: end -->") + text.count("<!-- generated: end -->")
    if count != ends or count != text.count("; written by docs/generate.py -->"):
        raise SystemExit(f"{path}: a measured or generated part is not opened or not closed")
    return written


# ----------------------------------------------------------------------------------------- the reference

#: (heading, module, names): what a user may call. Read from the source, so that torch need not be there.
PUBLIC: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Trace and plan", "tightfit.trace", ("trace",)),
    ("", "tightfit.plan", ("plan", "lowest", "every_block")),
    ("", "tightfit.plan.simulate", ("simulate",)),
    ("Apply and verify", "tightfit.fitting.fit", ("fit", "Longer")),
    ("", "tightfit.fitting.micro_batches", ("Fitted",)),
    ("", "tightfit.engine", ("apply", "Applied")),
    ("", "tightfit.engine.region", ("checkpoint",)),
    ("", "tightfit.verify", ("verify",)),
    ("", "tightfit.verify.measure", ("measure",)),
    ("Switches", "tightfit.fitting.switches", ("enable", "active", "disable", "Activity")),
    ("Integrations", "tightfit.integrations.trainer", ("TightfitCallback",)),
    ("", "tightfit.integrations.peaks", ("PeakCallback",)),
    ("", "tightfit.integrations.recovery", ("Recovery", "Retry", "OutOfMemory", "TornStep")),
    ("", "tightfit.integrations.transformers", ("load_model", "random_batch")),
    ("", "tightfit.integrations.lightning", ("TightfitCallback",)),
    ("", "tightfit.integrations.axolotl", ("TightfitPlugin", "TightfitSettings")),
    ("", "tightfit.integrations.peft", ("add_lora",)),
    ("", "tightfit.integrations.accelerate", ("fit",)),
    ("Doctor", "tightfit.doctor", ("examine",)),
    ("Calibration", "tightfit.forecast.calibrating", ("calibrate",)),
    ("", "tightfit.device.calibration", ("Calibration", "using")),
    ("Types", "tightfit.core", (
        "Lever", "Plan", "Choice", "Timeline", "Proof", "Check", "Trace", "Status", "Action", "MicroBatches",
        "MicroBatch",
    )),
    ("Errors", "tightfit.core", (
        "TightfitError", "BudgetInfeasible", "InvalidInput", "PlanMismatch", "ReplayDiverged", "Unsupported",
    )),
    ("Sizes", "tightfit.core", ("parse_bytes", "format_bytes", "parse_levers")),
)  # fmt: skip


def _definition(module: str, name: str) -> ast.FunctionDef | ast.ClassDef:
    """Where `module` defines `name`, or the module that it imports `name` from."""
    base = ROOT / "src" / Path(*module.split("."))
    path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    body = ast.parse(path.read_text(encoding="utf-8")).body
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            return node
    for node in ast.walk(ast.Module(body=body, type_ignores=[])):  # a package's face has it from one of its modules
        if isinstance(node, ast.ImportFrom) and node.module and any(alias.name == name for alias in node.names):
            return _definition(node.module, name)
    raise SystemExit(f"{path} defines no {name}: mend PUBLIC in docs/generate.py")


def _imported_as(module: str, name: str) -> str:
    """What a user writes: most names are those of `tightfit` itself."""
    from tightfit import __all__ as own

    if module.startswith("tightfit.integrations"):
        return f"{module.replace('.trainer', '.transformers')}.{name}"
    return f"tightfit.{name}" if name in own else f"{module}.{name}"


def _signature(node: ast.FunctionDef, name: str) -> str:
    result = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    arguments = [part for part in ast.unparse(node.args).split("self, ", 1) if part != "self"]
    line = f"{name}({arguments[-1] if arguments else ''}){result}"
    if len(line) <= 84:
        return line
    stripped = ast.parse(f"def f({arguments[-1]}): pass").body[0]
    assert isinstance(stripped, ast.FunctionDef)
    found = stripped.args
    parts: list[str] = []
    plain = [*found.posonlyargs, *found.args]
    defaults: list[ast.expr | None] = [*[None] * (len(plain) - len(found.defaults)), *found.defaults]
    parts += [_argument(a, d) for a, d in zip(plain, defaults, strict=True)]
    if found.vararg is not None:
        parts.append("*" + ast.unparse(found.vararg))
    elif found.kwonlyargs:
        parts.append("*")
    parts += [_argument(a, d) for a, d in zip(found.kwonlyargs, found.kw_defaults, strict=True)]
    if found.kwarg is not None:
        parts.append("**" + ast.unparse(found.kwarg))
    return f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){result}"


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    if default is None:
        return ast.unparse(argument)
    return f"{ast.unparse(argument)} = {ast.unparse(default)}"


def _entry(module: str, name: str) -> str:
    node = _definition(module, name)
    lines = [f"### `{_imported_as(module, name)}`", ""]
    if isinstance(node, ast.FunctionDef):
        lines += ["```text", _signature(node, name), "```", ""]
    else:
        inits = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        if inits:
            lines += ["```text", _signature(inits[0], name).removesuffix(" -> None"), "```", ""]
    if text := ast.get_docstring(node):
        lines += [inspect.cleandoc(text).replace("<", "&lt;"), ""]
    if isinstance(node, ast.ClassDef):
        lines += _members(node)
    return "\n".join(lines).rstrip() + "\n"


def _members(node: ast.ClassDef) -> list[str]:
    """A table of fields, with the comment that stands beside them left to the source, and the methods' first lines."""
    rows = []
    for member in node.body:
        if isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name):
            default = "" if member.value is None else f" = {ast.unparse(member.value)}"
            rows.append((f"{member.target.id}: {ast.unparse(member.annotation)}{default}", ""))
        elif isinstance(member, ast.Assign) and isinstance(member.targets[0], ast.Name):
            rows.append((f"{member.targets[0].id} = {ast.unparse(member.value)}", ""))
        elif (
            isinstance(member, ast.FunctionDef)
            and not member.name.startswith(("_", "on_"))
            and (said := ast.get_docstring(member))
        ):
            rows.append((f"{member.name}()", said.splitlines()[0]))
    if not rows:
        return []
    cells = [(code.replace("|", "\\|"), said.replace("|", "\\|")) for code, said in rows if not code.startswith("_")]
    return ["| member | |", "|---|---|", *(f"| `{code}` | {said} |" for code, said in cells), ""]


def reference_page() -> str:
    """docs/reference.md: signatures and docstrings of what a user may call, from the source."""
    parts = [
        "<!-- Written by docs/generate.py (`make docs`) from the docstrings; do not edit. -->\n\n# Every name\n",
        "Signatures and docstrings, as in the source. An overview is in [Python API](api.md).\n",
    ]
    for heading, module, names in PUBLIC:
        if heading:
            parts.append(f"## {heading}\n")
        parts += [_entry(module, name) for name in names]
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Write the pages of docs/ that are generated, and the measured parts of the others and of README."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is stale")
    check = parser.parse_args().check
    fix_terminal()
    stale = False
    pages = [
        (PAGE, render()), (PEERS, peers_page()), (ZOO, zoo_page()), (FORECAST, forecast_page()),
        (TRAPS, traps_page()), (SWITCHES, switches_page()), (LEVERS, levers_page()),
        (SEVERAL_GPUS, several_gpus_page()), (GPU, gpu_page()), (REFERENCE, reference_page()),
        (ARCHITECTURE, architecture_svg()),
    ]  # fmt: skip
    written = {page for page, _ in pages}
    others = [README, RESULTS / "README.md", KIT / "README.md"]
    others += sorted(page for page in README.with_name("docs").rglob("*.md") if page not in written)
    pages += [(page, with_measured(page)) for page in others]
    for page, text in pages:
        on_disk = page.read_text(encoding="utf-8") if page.exists() else ""
        if page.exists() and text == on_disk:
            print(f"{page}: unchanged")
        elif check:
            stale = True
            difference = difflib.unified_diff(
                on_disk.splitlines(), text.splitlines(), str(page), "what it should be", lineterm=""
            )
            print("\n".join(difference))
            print(f"{page} is stale: run `make docs`", file=sys.stderr)
        else:
            page.write_text(text, encoding="utf-8")
            print(f"{page}: written")
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
