"""The page "Will it run?": what it says without a script, and in a real browser by mouse and keyboard.

The data is made up, without torch: two models, two methods, two lengths, four cards, every kind of answer.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tightfit.report import site_page, site_summary

GIB = 2**30
EVIL = "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"

#: Which cards run it, by what the leanest needs.
CARDS = (("t4", 16), ("rtx-4090", 24), ("a100-80gb", 80), ("a100-twin", 80))


def way(how: str, peak: int, owner: str = "backward of layers.3: aten.mm", **changed: Any) -> dict[str, Any]:
    by_category = {} if how in ("floor", "one op") else {"parameters": peak * 2 // 3, "saved": peak - peak * 2 // 3}
    essence = ["12 of 32 units recompute part of what they make"] if how in ("plan", "tiles") else []
    made = {"how": how, "peak_bytes": peak, "peak_owner": owner, "by_category": by_category, "levers": [],
            "essence": essence}  # fmt: skip
    return {**made, **changed}


def cell(model: str, method: str, seq: int, needs: tuple[int, int, int], **changed: Any) -> dict[str, Any]:
    """`needs`: GiB in tiles, with a plan, and as it is."""
    tiles, plan, plain = (gib * GIB for gib in needs)
    ways = [way("plain", plain), way("plan", plan), way("tiles", tiles)]
    answers = []
    for name, gib in CARDS:
        room = (gib - 1) * GIB
        turn = 0 if plain <= room else 1 if plan <= room else 2
        fits = tiles <= room
        second = gib / 10 + len(name) / 1000
        answers.append([
            int(fits), turn, (plain, plan, tiles)[turn], second if fits else None,
            1.0 + turn / 4 if fits else None,
        ])  # fmt: skip
    made = {
        "model": model, "method": method, "seq": seq, "environment": 0, "date": "2026-11-29T10:00:00+00:00",
        "cpu_seconds": 1.0, "refused": "", "notes": ["a note"], "ways": ways, "answers": answers,
    }  # fmt: skip
    return {**made, **changed}


def document(model: str = "small-1b", card: str = "t4") -> dict[str, Any]:
    names = [card, *(name for name, _ in CARDS[1:])]
    return {
        "type": "WillItRun", "schema_version": 1,
        "question": {"batch": 1, "dtype": "bf16", "optimizer": "adamw", "rank": 16, "trainer": "model",
                     "accumulate": False, "options": ""},
        "cards": [
            {"name": name, "memory_bytes": gib * GIB, "usable_bytes": (gib - 1) * GIB, "kind": "cuda",
             "source": "https://example.org/card", "calibration": "", "notes": [], "error_bar": "give or take",
             "quoted": f"'{name}'" if name == EVIL else name, "rates": [1e14, 1e12]}
            for name, (_, gib) in zip(names, CARDS, strict=True)
        ],
        "environments": [{"tightfit": "0.1.0", "torch": "9.9"}],
        "models": {name: {"source": "somewhere", "quoted": name} for name in (model, "large-70b")},
        "cells": [
            cell(model, "full", 1024, (4, 6, 8)), cell(model, "full", 4096, (10, 20, 40)),
            cell(model, "qlora", 1024, (1, 2, 3)), cell(model, "qlora", 4096, (2, 17, 30)),
            cell("large-70b", "full", 1024, (500, 600, 700), ways=[way("floor", 500 * GIB, "weights together")],
                 answers=[[0, 0, 500 * GIB, None, None]] * 4),
            cell("large-70b", "full", 4096, (1, 1, 1), refused="no kernel for this", ways=[], answers=[]),
            cell("large-70b", "qlora", 1024, (40, 60, 90)), cell("large-70b", "qlora", 4096, (81, 90, 99)),
        ],
    }  # fmt: skip


@pytest.fixture
def opened(opened_html: Any) -> Any:
    """Open a document in a tab of its own."""
    return lambda made, **how: opened_html(site_page(made), **how)


def test_the_summary_counts() -> None:
    made = site_summary(document())
    assert made == {
        "models": 2, "cards": 4, "answers": 28, "fitting": 16 + 2, "refused": 1, "first": "2026-11-29",
        "last": "2026-11-29",
    }  # fmt: skip


def test_the_table_without_a_script_names_the_smallest_cards_and_the_refusal() -> None:
    page = site_page(document())
    assert "<td>small-1b</td><td>full</td>" in page
    row = page[page.index('<td>small-1b</td><td>full</td><td class="n">4,096</td>') :].split("</tr>")[0]
    assert "80.0 GiB (a100-80gb)" in row and "24.0 GiB (rtx-4090)" in row and "16.0 GiB (t4)" in row
    row = page[page.index('<td>large-70b</td><td>QLoRA</td><td class="n">1,024</td>') :].split("</tr>")[0]
    assert row.endswith("<td>-</td><td>80.0 GiB (a100-80gb)</td><td>-</td>")  # what does not fit is no card's way
    assert "cannot be forecast" in page and "no kernel for this" in page
    assert "give or take" in page and "torch 9.9" in page and "https://example.org/card" in page


def test_data_cannot_break_out_of_the_page() -> None:
    page = site_page(document(EVIL, EVIL))
    assert page.count("<script") == 2 and "<img" not in page.replace("\\u003cimg", "")


def cells(tab: Any, column: str) -> list[str]:
    found: list[str] = tab.ask(
        f"[...document.querySelectorAll('#rows td[data-label={json.dumps(column)}]')].map(e => e.textContent)"
    )
    return found


def choose(tab: Any, **values: str) -> None:
    for name, value in values.items():
        tab.ask(
            f"(s => {{ s.value = {json.dumps(value)}; s.dispatchEvent(new Event('change')); }})"
            f"(document.getElementById('f-{name}'))"
        )


def why(tab: Any, turn: int = 0) -> str:
    tab.ask(f"document.querySelectorAll('#rows td.do button')[{turn}].click()")
    found: str = tab.ask("document.querySelector('#rows tr.why').textContent")
    return found


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_said_or_fetched_and_the_page_is_as_wide_as_the_window(opened: Any, width: int, scheme: str) -> None:
    tab = opened(document(), width=width, scheme=scheme)
    why(tab)
    assert tab.ask("document.documentElement.dataset.ready") == "1"
    assert tab.ask("document.documentElement.scrollWidth") == tab.ask("innerWidth") == width
    assert tab.said == [] and tab.requests == []
    assert tab.ask("getComputedStyle(document.body).backgroundColor") == (
        "rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 22, 26)"
    )


def test_filters_sorting_and_the_link(opened: Any) -> None:
    tab = opened(document())
    assert set(cells(tab, "card")) == {"rtx-4090"} and len(cells(tab, "card")) == 7
    assert tab.ask("document.getElementById('count').textContent") == "4 of 7 fit"
    choose(tab, card="", model="small-1b", method="full", seq="4096")
    assert cells(tab, "card") == [name for name, _ in CARDS]
    assert cells(tab, "will it run?") == ["yes, in tiles", "yes, with a plan", "yes, as it is", "yes, as it is"]
    choose(tab, memory="<25769803776")
    assert cells(tab, "card") == ["t4", "rtx-4090"]
    choose(tab, fits="plan")
    assert cells(tab, "card") == ["rtx-4090"]
    assert "model=small-1b" in tab.ask("location.hash") and "fits=plan" in tab.ask("location.hash")
    tab.ask("document.getElementById('reset').click()")
    assert len(cells(tab, "card")) == 28
    head = "document.querySelectorAll('#heads button')[7]"  # seconds
    tab.ask(f"{head}.click()")
    known = [float(text.removesuffix(" s")) for text in cells(tab, "step (est.)") if text != "-"]
    assert known == sorted(known) and cells(tab, "step (est.)")[-1] == "-"
    tab.ask(f"{head}.click()")
    known = [float(text.removesuffix(" s")) for text in cells(tab, "step (est.)") if text != "-"]
    assert known == sorted(known, reverse=True) and cells(tab, "step (est.)")[-1] == "-"
    assert tab.ask("document.querySelectorAll('#heads th')[7].getAttribute('aria-sort')") == "descending"


def test_the_why_of_a_no_names_what_would_fit(opened: Any) -> None:
    tab = opened(document())
    choose(tab, card="t4", model="large-70b", method="qlora", seq="1024")
    said = why(tab)
    assert "No: the leanest way that was found reserves 40.0 GiB, in tiles, 25.0 GiB more than the 15.0 GiB" in said
    assert "It would fit: a card with 80.0 GiB (a100-80gb, a100-twin)." in said
    assert "tightfit check large-70b --gpu t4 --method qlora --seq 1024 --no-search" in said
    assert "backward of layers.3" in said and "torch 9.9" in said and "Rates are the maker's" in said
    choose(tab, method="full")
    assert "weights together take 500.0 GiB, whatever the batch" in why(tab)
    made = document()
    made["cells"][1] = cell("small-1b", "full", 4096, (15, 20, 40), answers=[[0, 2, 16 * GIB, None, None]] * 4)
    tab = opened(made)
    choose(tab, card="t4", model="small-1b", method="full", seq="4096")
    said = why(tab)
    assert "It would fit: QLoRA at 4,096 tokens (in tiles); full at 1,024 tokens (as it is)" in said
    assert "only just too much" not in said  # a GiB of 15


def test_the_keyboard_reaches_everything(opened: Any) -> None:
    tab = opened(document())
    stops = []
    for _ in range(60):
        tab.press("Tab")
        stops.append(tab.ask("(e => e.id || e.getAttribute('aria-label') || e.textContent)(document.activeElement)"))
        if stops[-1] == "download":
            break
    for each in ("f-model", "f-card", "f-fits", "reset", "model", "slowdown", "download"):
        assert each in stops, stops
    opener = "why: small-1b, full at 1,024 tokens, rtx-4090"
    assert opener in stops
    tab.ask(f"document.querySelector('[aria-label={json.dumps(opener)}]').focus()")
    tab.press("Enter")
    assert tab.ask("document.activeElement.getAttribute('aria-expanded')") == "true"
    tab.press("Tab")
    assert tab.ask("document.activeElement.textContent") == "copy"
    tab.press("Enter")
    assert tab.ask(
        "new Promise(r => setTimeout(() => r(document.querySelector('.command [role=status]').textContent), 200))"
    ) in ("copied", "selected: copy it with your keys")
    tab.ask("document.getElementById('f-fits').focus()")
    for _ in range(2):
        tab.press("ArrowDown")
    assert tab.ask("document.getElementById('f-fits').value") != ""


def test_the_mouse_opens_an_answer(opened: Any) -> None:
    tab = opened(document(), width=390)
    x, y, w, h = tab.ask(
        "(e => { e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
        " return [b.x, b.y, b.width, b.height]; })(document.querySelector('#rows td.do button'))"
    )
    tab.point(x + w / 2, y + h / 2, click=True)
    assert "It fits: 8.00 GiB reserved of the 23.0 GiB" in tab.ask("document.querySelector('tr.why').textContent")


def test_hostile_names_stay_text(opened: Any) -> None:
    tab = opened(document(EVIL, EVIL))
    tab.ask("document.getElementById('reset').click()")
    assert EVIL in why(tab)
    assert tab.ask("document.images.length") == 0 and tab.ask("document.scripts.length") == 2
    assert tab.ask("document.title") == "Will it run? tightfit"
    assert tab.said == [] and tab.requests == []


def test_without_a_script_the_table_is_there(opened: Any) -> None:
    tab = opened(document(), script=False)
    shown = tab("Accessibility.getFullAXTree")["nodes"]
    said = " | ".join(str(node["name"]["value"]) for node in shown if not node["ignored"] and node.get("name"))
    for text in ("Will it run?", "need JavaScript", "24.0 GiB (rtx-4090)", "no kernel for this", "give or take"):
        assert text in said, text
    assert not any(node["role"]["value"] == "combobox" for node in shown if not node["ignored"])


def test_twenty_thousand_answers_are_small_and_quick(opened: Any) -> None:
    made = document()
    made["cards"] = [{**made["cards"][1], "name": f"card-{i}"} for i in range(73)]
    base = cell("m", "full", 1024, (2, 5, 20))
    made["models"] = {f"model-{i}": {"source": "", "quoted": f"model-{i}"} for i in range(24)}
    made["cells"] = [
        {**base, "model": f"model-{i}", "method": method, "seq": seq, "answers": [base["answers"][1]] * 73}
        for i in range(24) for method in ("full", "lora", "qlora") for seq in (1024, 4096, 16384, 65536)
    ]  # fmt: skip
    page = site_page(made)
    assert len(page.encode()) < 4_000_000
    tab = opened(made, width=390)
    assert tab.ask("performance.getEntriesByName('ready')[0].startTime") < 3000
    assert "21,024 of 21,024 fit; the first 100 are shown" in tab.ask("document.getElementById('count').textContent")
    tab.ask("document.getElementById('more').click()")
    assert len(cells(tab, "card")) == 200
    assert tab.ask("document.activeElement.closest('tr').rowIndex") == 101
