"""The page "Will it run?": models by method by length by card, from the answers that `tightfit check --site` gathered.

`site_page` puts the whole document into the template `site.html`, whose script filters, sorts and explains. Without a
script there is a table of the smallest cards that run each step.

Invariant: every verdict on the page is a survey's own; what is worked out here only compares such verdicts (which card
is the smallest that fits). No request to any other place, every text escaped, as in `report.html`. Refused: nothing.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from tightfit.core import format_bytes
from tightfit.report.html import filled, titled_table

__all__ = ["site_page", "site_summary"]

_METHODS = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}


def site_summary(document: Mapping[str, Any]) -> dict[str, Any]:
    """How much there is, and how much of it fits."""
    cells = [cell for cell in document["cells"] if not cell["refused"]]
    answers = [answer for cell in cells for answer in cell["answers"]]
    dates = sorted(cell["date"][:10] for cell in document["cells"])
    return {
        "models": len({cell["model"] for cell in document["cells"]}),
        "cards": len(document["cards"]),
        "answers": len(answers),
        "fitting": sum(answer[0] for answer in answers),
        "refused": len(document["cells"]) - len(cells),
        "first": dates[0] if dates else "",
        "last": dates[-1] if dates else "",
    }


def site_page(document: Mapping[str, Any]) -> str:
    """The whole page as one string."""
    return filled("site.html", document, {"BODY": _head(document), "TAIL": _smallest(document) + _rests_on(document)})


def _head(document: Mapping[str, Any]) -> str:
    told, question = site_summary(document), document["question"]
    facts = {
        "answers": f"{told['answers']:,}, of which {told['fitting']:,} fit",
        "models": told["models"],
        "cards": told["cards"],
        "one step of": f"batch {question['batch']}, {question['dtype']}, {question['optimizer']}",
        "adapters": f"LoRA of rank {question['rank']} on every linear layer",
        "forecast": ", ".join(
            [
                _days(told["first"], told["last"]),
                *dict.fromkeys(_versions(made, ("tightfit", "torch")) for made in document["environments"]),
            ]
        ),
    }
    shown = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd></div>" for name, value in facts.items()
    )
    return (
        '<h1 class="answer">Will it run?</h1>\n'
        "<p>Which models train on which card: each answer is a forecast of the whole training step, planned and laid "
        "out in the card&#8217;s memory. None was measured on the card. Bytes are forecast; seconds are estimated from "
        f'<a href="#rests">the makers&#8217; rates</a>.</p>\n<dl class="facts">{shown}</dl>\n'
        + "".join(f'<p class="soft">Error bar: {html.escape(bar)}.</p>\n' for bar in _bars(document)[:1])
    )


def _bars(document: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(card["error_bar"] for card in document["cards"]))


def _versions(environment: Mapping[str, str], names: Sequence[str]) -> str:
    return ", ".join(f"{name} {environment[name]}" for name in names if name in environment)


def _days(first: str, last: str) -> str:
    return first if first == last else f"{first} to {last}"


def _smallest(document: Mapping[str, Any]) -> str:
    cards = document["cards"]
    rows: list[Sequence[Any]] = []
    for cell in document["cells"]:
        begin = (cell["model"], _METHODS[cell["method"]], f"{cell['seq']:,}")
        if cell["refused"]:
            rows.append((*begin, "cannot be forecast", cell["refused"], ""))
            continue
        fitting = {how: _smallest_card(cell, cards, how) for how in ("plain", "plan", "tiles")}
        rows.append((*begin, *fitting.values()))
    heads = ("model", "method", "tokens", "as it is, from", "with a plan, from", "in tiles, from")
    return (
        titled_table("The smallest cards that run it", heads, rows, figures=(2,), id="smallest")
        + '<p class="soft">For each way to run a step, the least memory of a card here on which it fits, and the first '
        "such card. A dash: on no card here, or a card as small runs it in a way further left. As it is: without a "
        "plan. With a plan: gradients are the same bit for bit. In tiles: they are the same but for rounding.</p>"
    )


def _smallest_card(cell: Mapping[str, Any], cards: Sequence[Mapping[str, Any]], how: str) -> str:
    fitting = [
        (card["memory_bytes"], turn)
        for turn, (card, answer) in enumerate(zip(cards, cell["answers"], strict=True))
        if answer[0] and cell["ways"][answer[1]]["how"] == how
    ]
    if not fitting:
        return "-"
    size, turn = min(fitting)
    return f"{format_bytes(size)} ({cards[turn]['name']})"


def _rests_on(document: Mapping[str, Any]) -> str:
    """What the figures rest on: error bars, rates with their sources, versions and dates."""
    cards = document["cards"]
    used = {cell["environment"] for cell in document["cells"]}
    parts = ['<h2 id="rests">What these answers rest on</h2>']
    parts += [f"<p>Error bar: {html.escape(bar)}.</p>" for bar in _bars(document)]
    parts.append(
        "<p>Plans are made quickly, and for the rates of one of the cards that share them. The command of an answer "
        "plans for its card alone and for longer: it may find a faster plan, and where the least is only just too "
        "much, one that fits.</p>"
    )
    for turn, versions in enumerate(document["environments"]):
        if turn in used:
            said = _versions(versions, tuple(versions))
            dates = sorted({cell["date"][:10] for cell in document["cells"] if cell["environment"] == turn})
            parts.append(f"<p>Forecast on {_days(dates[0], dates[-1])} by {html.escape(said)}.</p>")
    rows = [
        (
            card["name"], format_bytes(card["memory_bytes"]), format_bytes(card["usable_bytes"]),
            f"{card['rates'][0] / 1e12:,.1f}", f"{card['rates'][1] / 1e9:,.0f}",
            card["calibration"] or card["source"], "; ".join(card["notes"]),
        )
        for card in cards
    ]  # fmt: skip
    heads = ("card", "memory", "for tensors", "TFLOP/s", "GB/s", "maker's figures from", "notes")
    parts.append(titled_table("The cards", heads, rows, figures=(1, 2, 3, 4)))
    sources = [(name, made["source"] or "a config of one's own") for name, made in document["models"].items()]
    parts.append(titled_table("The models", ("model", "its shape is from"), sources))
    return "\n".join(parts)
