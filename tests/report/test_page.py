"""The page in a real browser: what people with a mouse, a keyboard, a screen reader, paper or a phone get.

The data is made up, without torch: three units, four points, every action, names that try to be code.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tightfit.report import page

EVIL = "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"


def point(name: str, peak: int, slowdown: float, kept: str, inputs: str = "kkk", **changed: Any) -> dict[str, Any]:
    rises = [(0.0, 0, 0.3), (0.2, 1, 0.7), (0.4, 2, 1.0), (0.6, 3, 0.8), (0.8, 1, 0.5), (1.0, 4, 0.4)]
    moments = [
        {"at": at, "label": label, "by_category": [peak // 4, int((peak - peak // 4) * share), 0]}
        for at, label, share in rises
    ]
    made = {
        "name": name, "budget_bytes": peak, "peak_bytes": peak, "slowdown": slowdown, "recompute_share": slowdown - 1,
        "replays": 3, "peak_owner": f"backward of layers.2: {name}", "moments": moments, "kept": [kept] * 3,
        "inputs": inputs,
    }  # fmt: skip
    return {**made, **changed}


def document(**changed: Any) -> dict[str, Any]:
    tensors = [
        {"ordinal": i, "size_bytes": size << 20, "shape": [size, 1024, 256], "dtype": "float32", "op": op,
         "seconds": 1e-3}
        for i, (op, size) in enumerate([("mm", 4), ("gelu", 8), ("add", 2)])
    ]  # fmt: skip
    labels = ["forward of layers.0: mm", "forward of layers.2: mm", "backward of layers.2: mm",
              "replay of layers.1: mm", "optimizer step: add"]  # fmt: skip
    study = {
        "categories": ["parameters", "saved", "workspace"], "labels": labels, "kinds": [tensors], "chosen": 1,
        "units": [{"path": f"layers.{i}", "kind": 0, "pinned": "frozen" if i == 0 else ""} for i in range(3)],
        "points": [
            point("none", 40 << 20, 1.0, "kkk"), point("chosen", 30 << 20, 1.1, "krk"),
            point("lowest", 20 << 20, 1.4, "rot", "kso"), point("every-block", 20 << 20, 1.5, "rrr"),
        ],
        "levers": [{"lever": "recompute", "bought_bytes": 10 << 20, "slowdown": 0.1,
                    "how": "3 units make values again"}],
    }  # fmt: skip
    made = {
        "kind": "measure", "good": True, "answer": "a model fits", "facts": {"peak": "30 MiB"}, "note": "a note",
        "checks": [
            {"name": "gradients", "expected": "3", "measured": "3 identical", "tolerance": "none", "passed": True}
        ],
        "measured": [
            {"mode": "none", "peak_bytes": 40 << 20, "predicted_peak_bytes": 40 << 20, "slowdown": 1.0,
             "step_seconds": 1.0, "recompute_share": 0.0, "gradients": "reference"},
            {"mode": "every-block", "peak_bytes": 21 << 20, "predicted_peak_bytes": 20 << 20, "slowdown": 1.45,
             "step_seconds": 1.45, "recompute_share": 0.9, "gradients": "identical"},
            {"mode": "tightfit", "peak_bytes": 30 << 20, "predicted_peak_bytes": 30 << 20, "slowdown": 1.12,
             "step_seconds": 1.12, "recompute_share": 0.1, "gradients": "identical"},
        ],
        "steps": [{"step": i, "loss": 3.0 - i / 9, "peak_bytes": (30 << 20) + i} for i in range(1, 9)],
        "study": study, "environment": {"torch": "x"}, "record": {"a": 1},
    }  # fmt: skip
    return {**made, **changed}


def evil_document() -> dict[str, Any]:
    """Every text that comes from a model, a unit, an op, a lever or a machine is hostile."""
    made = document(answer=EVIL, facts={EVIL: EVIL}, note=EVIL, environment={EVIL: EVIL})
    made["checks"] = [{"name": EVIL, "expected": EVIL, "measured": EVIL, "tolerance": EVIL, "passed": True}]
    made["study"]["labels"] = [EVIL] * 5
    made["study"]["categories"] = [EVIL] * 3
    for unit in made["study"]["units"]:
        unit["path"] = unit["pinned"] = EVIL
    for tensor in made["study"]["kinds"][0]:
        tensor["op"] = tensor["dtype"] = EVIL
    for each in made["study"]["points"]:
        each["peak_owner"] = EVIL
    made["study"]["points"][1]["name"] = EVIL
    made["study"]["levers"] = [{"lever": EVIL, "bought_bytes": 1, "slowdown": 0.1, "how": EVIL}]
    made["measured"][2]["mode"] = EVIL
    return made


@pytest.fixture
def opened(opened_html: Any) -> Any:
    """Open a document in a tab of its own."""
    return lambda made, **how: opened_html(page(made), **how)


ACTIONS = "Array.from(document.querySelectorAll('#map button'), b => b.className.replace('input ', '')[0]).join('')"
PLACE = (
    "(e => { e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
    " return [b.x, b.y, b.width, b.height]; })(%s)"
)


def text_of(tab: Any, selector: str) -> str:
    found: str = tab.ask(f"document.querySelector({json.dumps(selector)}).textContent")
    return found


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_said_or_fetched_and_the_page_is_as_wide_as_the_window(opened: Any, width: int, scheme: str) -> None:
    tab = opened(document(), width=width, scheme=scheme)
    assert tab.ask("document.documentElement.dataset.ready") == "1"
    assert tab.ask("document.documentElement.scrollWidth") == tab.ask("innerWidth") == width
    assert tab.said == [] and tab.requests == []
    assert tab.ask("performance.getEntriesByType('resource').length") == 0
    assert tab.ask("getComputedStyle(document.body).backgroundColor") == (
        "rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 22, 26)"
    )


def test_the_browser_would_tell_of_an_error_and_a_request(chromium: Any, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text("<img src='http://127.0.0.1:9/x.png'><script>console.error('one'); throw Error('two')</script>")
    tab = chromium.page()
    tab.open(file)
    assert tab.requests == ["http://127.0.0.1:9/x.png"]
    assert "one" in tab.said and any("two" in said for said in tab.said)


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.2."""
    parts = [
        int(c * 2 if len(colour) == 4 else c, 16) / 255
        for c in re.findall("." if len(colour) == 4 else "..", colour[1:])
    ]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_as_wcag_computes_it() -> None:
    assert contrast("#fff", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.478, abs=1e-3)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_at_least_aa(opened: Any, scheme: str) -> None:
    """Texts 4.5 to 1, and 3 to 1 for what a drawing or a control is made of (WCAG 1.4.3 and 1.4.11)."""
    tab = opened(document(), scheme=scheme)
    names = sorted(set(re.findall(r"--([a-z0-9]+):", page(document()))))
    colour = {
        name: tab.ask(f"getComputedStyle(document.documentElement).getPropertyValue('--{name}').trim()")
        for name in names
    }
    for ground in ("bg", "card"):
        for name in ("fg", "soft"):
            assert contrast(colour[name], colour[ground]) >= 4.5, (name, ground)
    for name in ("good", "bad", "accent", "edge", "keep", "re", "off", "tile", *(f"c{i}" for i in range(10))):
        assert contrast(colour[name], colour["bg"]) >= 3, name


def test_a_dark_screen_prints_on_white(opened: Any) -> None:
    tab = opened(document(), scheme="dark", media="print")
    assert tab.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.ask("getComputedStyle(document.querySelector('#download')).display") == "none"
    assert tab.ask("document.querySelector('#map .blocks button').getBoundingClientRect().height") > 10
    coloured = "[...document.querySelectorAll('.legend i,#map button')]"
    coloured += ".every(e => getComputedStyle(e).printColorAdjust === 'exact')"
    assert tab.ask(coloured)
    paper = tab.paper()
    assert paper.startswith(b"%PDF-") and len(re.findall(rb"/Type\s*/Page\b", paper)) <= 4


def test_without_a_script_the_answer_the_checks_and_the_tables_are_there(opened: Any) -> None:
    tab = opened(document(), script=False)
    shown = tab("Accessibility.getFullAXTree")["nodes"]
    said = " | ".join(str(node["name"]["value"]) for node in shown if not node["ignored"] and node.get("name"))
    for text in ("a model fits", "3 identical", "this plan", "40.0 MiB", "1.10 x", "every block", "recompute",
                 "need JavaScript", "3 units make values again", "+5.0000%", "Loss 2.889", "a note"):  # fmt: skip
        assert text in said, text
    assert not any(node["role"]["value"] == "slider" for node in shown if not node["ignored"])


NEED_NAMES = {"button", "slider", "image", "group", "region", "table", "link", "textbox", "combobox", "img"}


def test_every_control_and_drawing_has_a_name(opened: Any) -> None:
    tab = opened(document())
    nodes = [node for node in tab("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    found = [
        (n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if n["role"]["value"] in NEED_NAMES
    ]
    assert [role for role, name in found if role != "table" and not name.strip()] == []
    roles = [role for role, _ in found]
    assert roles.count("slider") == 2 and roles.count("image") == 3 and roles.count("button") == 3 * 4 + 3
    assert ("slider", "Budget") in found and ("button", "layers.1, gelu, 8.00 MiB, recomputed") in found
    drawn = tab.ask(
        "[...document.querySelectorAll('svg')].filter(s => !s.closest('[aria-hidden]')"
        " && !(s.getAttribute('role') && (s.getAttribute('aria-label') || s.getAttribute('aria-labelledby')))).length"
    )
    assert drawn == 0


def test_the_keyboard_reaches_everything(opened: Any) -> None:
    tab = opened(document())
    tab.ask("document.body.focus()")
    stops = []
    for _ in range(30):
        tab.press("Tab")
        stops.append(tab.ask("(e => e.id || e.getAttribute('aria-label') || e.tagName)(document.activeElement)"))
        if stops[-1] == "download":
            break
    for each in ("budget", "timeline", "zoom-in", "zoom-out", "layers.0, its input, kept", "download"):
        assert each in stops, stops
    tab.press("Tab", shift=True)
    # every block of the map, from its one stop, by arrow keys
    tab.ask("document.querySelector('#map button').focus()")
    seen = set()
    for down in range(3):
        tab.press("Home")
        for _ in range(4):
            seen.add(tab.ask("document.activeElement.getAttribute('aria-label')"))
            tab.press("ArrowRight")
        if down < 2:
            tab.press("ArrowDown")
    every = tab.ask("[...document.querySelectorAll('#map button')].map(b => b.getAttribute('aria-label'))")
    assert len(every) == 12 and seen == set(every)
    assert "float32 2 x 1024 x 256" in text_of(tab, "#map-said")
    # all that takes a click takes the focus, but the curve's marks, which the slider stands for
    assert tab.ask(
        "[...document.querySelectorAll('button,input,a,[role=slider]')]"
        ".every(e => e.tabIndex >= 0 || e.closest('#map'))"
    )


def test_the_budget_moves_the_map_the_timeline_and_the_table(opened: Any) -> None:
    tab = opened(document())

    def state() -> tuple[str, str, str, str, str]:
        return (
            tab.ask("document.getElementById('timeline').innerHTML"),
            tab.ask(ACTIONS),
            text_of(tab, "#budget-said"), text_of(tab, "tr.here td"),
            tab.ask("document.querySelector('[data-mark=here]').getAttribute('cx')"),
        )  # fmt: skip

    tab.ask("document.getElementById('budget').focus()")
    first = state()
    assert "(the plan of this page)" in first[2] and first[3] == "this plan" and first[1] == "kkrk" * 3
    tab.press("ArrowLeft")  # less memory
    second = state()
    assert "20.0 MiB" in second[2] and second[3] == "lowest"
    assert second[1] == "krotsrotorot"
    assert all(a != b for a, b in zip(first, second, strict=True))
    tab.press("End")
    last = state()
    assert "(no plan)" in last[2] and last[1] == "k" * 12
    assert tab.ask("document.getElementById('budget').getAttribute('aria-valuetext')") == last[2]


def test_the_timeline_answers_the_mouse_and_the_keys(opened: Any) -> None:
    tab = opened(document())
    said = text_of(tab, "#time-said")
    assert said.startswith("The peak is 30.0 MiB")
    box = tab.ask(PLACE % "document.getElementById('timeline')")
    tab.point(box[0] + 72, box[1] + 100)
    assert "forward of layers.0: mm" in text_of(tab, "#time-said")
    tab.point(box[0] + box[2] - 12, box[1] + 100)
    assert "optimizer step: add" in text_of(tab, "#time-said")
    tab.ask("document.getElementById('timeline').focus()")
    tab.press("Home")
    tab.press("ArrowRight")
    assert "forward of layers.2: mm" in text_of(tab, "#time-said") and "saved 15." in text_of(tab, "#time-said")
    assert tab.ask("document.getElementById('timeline').getAttribute('aria-valuetext')") == text_of(tab, "#time-said")
    whole = tab.ask("document.getElementById('timeline').innerHTML")
    tab.press("+")
    near = tab.ask("document.getElementById('timeline').innerHTML")
    assert near != whole
    tab.press("End")  # a zoomed view follows the cursor
    assert "optimizer step: add" in text_of(tab, "#time-said")
    tab.ask("document.getElementById('zoom-out').click()")
    assert tab.ask("document.querySelectorAll('#timeline polygon').length") == 2


def test_a_tensor_is_chosen_with_a_click(opened: Any) -> None:
    tab = opened(document())
    box = tab.ask(PLACE % "document.querySelectorAll('#map button')[2]")
    tab.point(box[0] + box[2] / 2, box[1] + box[3] / 2, click=True)
    assert text_of(tab, "#map-said") == (
        "layers.0: gelu, float32 8 x 1024 x 256, 8.00 MiB, recomputed; its op takes 1.000 ms. "
        "Not keeping it frees 8.00 MiB; backward makes it again. The unit is kept whole: frozen."
    )


def test_hostile_names_stay_text(opened: Any) -> None:
    made = evil_document()
    tab = opened(made)
    tab.ask("document.getElementById('budget').focus()")
    for key in ("ArrowLeft", "ArrowRight"):
        tab.press(key)
    tab.ask("document.querySelectorAll('#map button')[2].click()")
    tab.ask("document.getElementById('timeline').focus()")
    tab.press("Home")
    assert tab.ask("document.documentElement.dataset.ready") == "1"
    assert text_of(tab, "h1") == EVIL and EVIL in text_of(tab, "#map-said") and EVIL in text_of(tab, "#time-said")
    assert tab.ask("document.images.length") == 0 and tab.ask("document.scripts.length") == 2
    assert tab.ask("document.title").startswith("tightfit: ")
    assert tab.said == [] and tab.requests == []


def test_the_page_gives_all_its_data(opened: Any) -> None:
    tab = opened(document())
    got = tab.ask("""(async () => {
      let blob; URL.createObjectURL = b => { blob = b; return "data:,"; }; HTMLAnchorElement.prototype.click = () => {};
      document.getElementById("download").click(); return await blob.text(); })()""")
    assert json.loads(got) == document()


@pytest.mark.parametrize("changed", [{"study": None}, {"measured": [], "steps": [], "checks": []}, {"note": ""}])
def test_pages_with_less_work_too(opened: Any, changed: dict[str, Any]) -> None:
    tab = opened(document(**changed))
    assert tab.ask("document.documentElement.dataset.ready") == "1" and tab.said == []
    assert tab.ask("document.getElementById('interactive').hidden") == ("study" in changed)


MARKS = """[...document.querySelectorAll('#curve [data-mark]')].map(e => { const b = e.getBBox();
  return [e.dataset.mark, b.x + b.width / 2, b.y + b.height / 2]; })"""
TEXTS = """[...document.querySelectorAll('#curve text.said')].map(e => { const b = e.getBBox();
  return [e.textContent, b.x, b.y, b.x + b.width, b.y + b.height]; })"""


def test_what_was_measured_is_on_the_curve_with_a_name_and_a_legend(opened: Any) -> None:
    tab = opened(document())
    places = {name: (x, y) for name, x, y in tab.ask(MARKS)}
    assert {"measured none", "measured every-block", "measured tightfit", "every-block", "chosen"} <= set(places)
    # the scale is one for all: measured where simulated where both say the same, higher where slower, right where more
    assert places["measured none"] == pytest.approx(places["none"], abs=0.6)
    assert places["measured tightfit"][0] == pytest.approx(places["chosen"][0], abs=0.6)
    assert places["measured tightfit"][1] < places["chosen"][1] - 2
    assert places["measured every-block"][0] > places["every-block"][0]
    assert places["measured every-block"][1] > places["every-block"][1] + 2
    assert places["here"] == pytest.approx(places["chosen"], abs=0.6)
    names = [text for text, *_ in tab.ask(TEXTS)]
    assert sorted(names) == ["every block", "every block, measured", "no checkpointing, measured", "tightfit, measured"]
    legend = text_of(tab, "#marks")
    assert "a plan (simulated)" in legend and "every block" in legend and "measured: peak and time" in legend


@pytest.mark.parametrize("width", [1280, 390])
def test_names_on_the_curve_lie_on_nothing(opened: Any, width: int) -> None:
    tab = opened(document(), width=width)
    texts = tab.ask(TEXTS)
    right = tab.ask("document.getElementById('curve').viewBox.baseVal.width")
    for i, (text, x0, y0, x1, y1) in enumerate(texts):
        assert x0 >= 0 and x1 <= right, text
        for other, a0, b0, a1, b1 in texts[i + 1 :]:
            assert x1 <= a0 or a1 <= x0 or y1 <= b0 + 1 or b1 <= y0 + 1, (text, other)


def test_a_run_whose_time_was_not_compared_stands_on_the_axis(opened: Any) -> None:
    made = document(measured=[{"mode": "this run", "peak_bytes": 30 << 20, "predicted_peak_bytes": 30 << 20}])
    tab = opened(made)
    places = {name: (x, y) for name, x, y in tab.ask(MARKS)}
    assert places["measured this run"][0] == pytest.approx(places["chosen"][0], abs=0.6)
    assert places["measured this run"][1] > places["chosen"][1]
    assert "its time was not compared" in text_of(tab, "#marks")
    alone = opened(document(measured=[]))
    assert "measured" not in text_of(alone, "#marks") and "every block" in text_of(alone, "#marks")
    assert "every-block" in [name for name, *_ in alone.ask(MARKS)]


def test_a_phone_prints_at_the_width_of_paper(opened: Any) -> None:
    tab = opened(document(), width=390)
    wide = "['timeline', 'curve', 'loss'].map(id => document.getElementById(id).viewBox.baseVal.width)"
    assert all(w < 390 for w in tab.ask(wide))
    tab.ask("dispatchEvent(new Event('beforeprint'))")
    assert tab.ask(wide) == [760] * 3
    tab.ask("dispatchEvent(new Event('afterprint'))")
    assert all(w < 390 for w in tab.ask(wide))


def test_a_page_of_32_layers_is_small_and_answers_within_two_seconds(opened: Any) -> None:
    made = document()
    study = made["study"]
    study["kinds"] = [study["kinds"][0] * 6]
    study["units"] = [{"path": f"model.layers.{i}", "kind": 0, "pinned": ""} for i in range(32)]
    asked = [("none", 40, 1.0), *((f"{i}%", 39 - i, 1 + i / 50) for i in range(16)), ("lowest", 20, 2.0)]
    study["points"] = [point(name, peak << 20, slow, "krrkok" * 3, "k" * 32) for name, peak, slow in asked]
    for each in study["points"]:
        each["kept"] *= 11
        each["moments"] = [
            {"at": i / 319, "label": i % 5, "by_category": [9 << 20, each["peak_bytes"] * i // 319, i]}
            for i in range(320)
        ]
    assert len(page(made).encode()) < 2_000_000
    tab = opened(made, width=390)
    assert tab.ask("document.querySelectorAll('#map button').length") == 32 * 19
    assert tab.ask("performance.getEntriesByName('ready')[0].startTime") < 2000
