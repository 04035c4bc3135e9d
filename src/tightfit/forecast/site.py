"""The answers behind the page "Will it run?": models by method by length by card, in one JSON file that grows.

Each cell (a model, a method, a length) is a survey of all cards. The file is written after every cell, so a run that is
interrupted goes on where it stopped, and a page can be drawn from the file alone. A folder may be added to, model by
model, by several runs at once. Cells of other versions are answered again.

Invariant: all answers of a folder are to one question (batch, dtype, optimizer, trainer, cards); a reader of the file
sees whole cells. Refused (`InvalidInput`): a folder of somebody else's, another question than the folder's. A step that
is refused is a cell too: it holds the reason.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tightfit.catalog import gpu_names, model_names, model_shape
from tightfit.core import Device, InvalidInput, Unsupported, to_json, write_text
from tightfit.core.errors import unknown
from tightfit.forecast.advice import error_bar, notes
from tightfit.forecast.room import card_named, device_asked, leave_room, usable_bytes
from tightfit.forecast.setup import METHODS, Progress, Setup
from tightfit.forecast.survey import Survey, survey
from tightfit.step.environment import environment

__all__ = ["ANSWERS", "LENGTHS", "Asked", "asked_of", "folder_for", "gather"]

#: The file of a site's data, beside the page.
ANSWERS = "answers.json"

#: Tokens that are asked about where no length is given, as far as the model has positions.
LENGTHS = (1024, 4096, 16384, 65536)

_TYPE, _SCHEMA = "WillItRun", 1

#: Whoever changes these may get another answer.
_VERSIONS = ("tightfit", "torch", "transformers", "peft", "trl", "bitsandbytes", "highspy")

_OF_A_CELL = ("model", "method", "seq")
_ANSWERED = ("environment", "date", "refused", "notes", "ways", "answers")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a site is to answer. `setup`: what is the same for all; its model, method and length are not looked at."""

    models: tuple[str, ...]
    methods: tuple[str, ...]
    seq: int | None  # none: `LENGTHS`
    cards: tuple[Device, ...]
    setup: Setup


def asked_of(model: str | None, method: str | None, seq: int | None, gpu: str | None, setup: Setup) -> Asked:
    """What the options mean: without a model all of the catalog, without a method all three, without a GPU all.

    Raises `InvalidInput` for a name or a size that is none.
    """
    from tightfit.integrations.transformers import config_named

    models = model_names() if model is None else (model,)
    if model is not None:
        config_named(model)
    methods = METHODS if method is None else tuple(each.strip() for each in method.split(","))
    for each in methods:
        if each not in METHODS:
            raise unknown("method", each, METHODS)
    if gpu is None or gpu.strip().lower() == "all":
        cards = tuple(card_named(name, one_of_many=True) for name in gpu_names())
    else:
        cards = tuple(device_asked(name.strip()) for name in dict.fromkeys(gpu.split(",")))
    for card in cards:
        leave_room(card, usable_bytes(card))
    dataclasses.replace(setup, model="", method=methods[0], seq=LENGTHS[0] if seq is None else seq).checked()
    return Asked(models=models, methods=methods, seq=seq, cards=cards, setup=setup)


def folder_for(out: Path, asked: Asked) -> dict[str, Any]:
    """The document of the site in `out`, a new one where there is none yet. Nothing is written.

    Raises `InvalidInput` for a place that is no site's, and for a site of another question.
    """
    fresh = {
        "type": _TYPE, "schema_version": _SCHEMA, "question": _question(asked.setup),
        "cards": [_card(card, asked.setup) for card in asked.cards], "environments": [], "models": {}, "cells": [],
    }  # fmt: skip
    where = f"cannot write a site to {str(out)!r}"
    if out.exists() and not out.is_dir():
        raise InvalidInput(f"{where}: it is no folder")
    if not out.exists():
        if not out.resolve().parent.is_dir():
            raise InvalidInput(f"{where}: there is no folder {str(out.resolve().parent)!r}")
        return fresh
    file = out / ANSWERS
    if not file.exists():
        if any(out.iterdir()):
            raise InvalidInput(f"{where}: it holds other files; give a new folder, or one that check --site wrote")
        return fresh
    there = read_document(file)
    for what, said in (("question", "other options"), ("cards", "other cards")):
        if there[what] != fresh[what]:
            told = f" ({_said(there[what])})" if what == "question" else ""
            raise InvalidInput(f"{where}: its answers are for {said}{told}; give the same, or another folder")
    return there


def read_document(file: Path) -> dict[str, Any]:
    """The document that `gather` wrote. Raises `InvalidInput` for any other file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInput(f"cannot read {str(file)!r}: {error}") from None
    if not isinstance(found, dict) or found.get("type") != _TYPE or found.get("schema_version") != _SCHEMA:
        raise InvalidInput(f"{str(file)!r} holds no answers of this tightfit's check --site: give another folder")
    if not _is_whole(found):
        raise InvalidInput(f"{str(file)!r} is damaged: give another folder, or remove that file to begin anew")
    return found


def _is_whole(document: Mapping[str, Any]) -> bool:
    """Has it the parts of a document, and its cells those of a cell? Their figures are not looked at."""
    kinds = {"question": dict, "cards": list, "environments": list, "models": dict, "cells": list}
    return all(isinstance(document.get(name), kind) for name, kind in kinds.items()) and all(
        isinstance(cell, dict) and cell.keys() >= {*_OF_A_CELL, *_ANSWERED} for cell in document["cells"]
    )


def gather(
    out: Path,
    asked: Asked,
    *,
    progress: Progress = lambda _: None,
    written: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Answer what is asked and not answered yet; the whole document. `written` is called with it after every model."""
    here = {name: version for name, version in environment().items() if name in _VERSIONS}
    document, now = _as_it_stands(out, asked, here)
    try:
        out.mkdir(exist_ok=True)
    except OSError as error:
        raise InvalidInput(f"cannot write a site to {str(out)!r}: {error}") from None
    if not (out / ANSWERS).exists():  # a run beside this one sees what the folder is for before it answers anything
        _write(out, document)
    steps = list(_steps(asked))
    try:
        for count, setup in enumerate(steps, start=1):
            where = f"{setup.model}, {setup.method}, {setup.seq} tokens ({count} of {len(steps)})"
            document, now = _as_it_stands(out, asked, here)
            if _is_new(document, setup, now):
                progress(where)
                cell = _cell(setup, asked.cards, _within(progress, where))
                document, now = _as_it_stands(out, asked, here)  # others may have added theirs meanwhile
                _put(document, setup, {**cell, "environment": now})
                _write(out, document)
            if count == len(steps) or steps[count].model != setup.model:
                written(document)
    except BaseException:
        if document["cells"]:  # what is there by now is on the page too
            written(document)
        raise
    return document


def _write(out: Path, document: Mapping[str, Any]) -> None:
    write_text(out / ANSWERS, json.dumps(document, separators=(",", ":")) + "\n")


def _as_it_stands(out: Path, asked: Asked, here: dict[str, str]) -> tuple[dict[str, Any], int]:
    """The document of the site as it is now, and where in it the versions `here` stand."""
    document = folder_for(out, asked)
    if here not in document["environments"]:
        document["environments"].append(here)
    return document, document["environments"].index(here)


def _within(progress: Progress, where: str) -> Progress:
    return lambda what: progress(f"{where}: {what}")


def _key(setup: Setup) -> list[Any]:
    return [setup.model, setup.method, setup.seq]


def _there(document: Mapping[str, Any], setup: Setup) -> dict[str, Any] | None:
    key = _key(setup)
    return next((cell for cell in document["cells"] if [cell[name] for name in _OF_A_CELL] == key), None)


def _is_new(document: Mapping[str, Any], setup: Setup, environment: int) -> bool:
    old = _there(document, setup)
    return old is None or old["environment"] != environment


def _put(document: dict[str, Any], setup: Setup, cell: dict[str, Any]) -> None:
    """Put `cell` in the place of an older one, in the catalog's order; models of other places stand behind."""
    old, known = _there(document, setup), {name: turn for turn, name in enumerate(model_names())}
    document["models"][setup.model] = _model(setup.model)
    document["cells"] = [each for each in document["cells"] if each is not old] + [cell]
    document["cells"].sort(
        key=lambda cell: (
            known.get(cell["model"].lower(), len(known)), cell["model"], METHODS.index(cell["method"]), cell["seq"],
        )
    )  # fmt: skip


def _steps(asked: Asked) -> Iterator[Setup]:
    for model in asked.models:
        for method in asked.methods:
            for seq in _lengths(model) if asked.seq is None else (asked.seq,):
                yield dataclasses.replace(asked.setup, model=model, method=method, seq=seq)


def _lengths(model: str) -> Sequence[int]:
    from tightfit.integrations.transformers import config_named, positions_of

    positions = positions_of(config_named(model)) or LENGTHS[-1]
    return sorted({min(length, positions) for length in LENGTHS})


def _cell(setup: Setup, cards: Sequence[Device], progress: Progress) -> dict[str, Any]:
    began = time.process_time()
    refused, found = "", Survey(ways=(), answers=(), notes=())
    try:
        found = survey(setup, cards, progress=progress)
    except (InvalidInput, Unsupported) as error:
        refused = str(error)
    return {
        "model": setup.model, "method": setup.method, "seq": setup.seq,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu_seconds": round(time.process_time() - began, 1), "refused": refused,
        "notes": list(found.notes), "ways": to_json(found.ways),
        # in the order of the cards: fits, which way, bytes reserved, seconds, slowdown
        "answers": [
            [int(each.fits), each.way, each.reserved_bytes, _digits(each.step_seconds), _digits(each.slowdown)]
            for each in found.answers
        ],
    }  # fmt: skip


def _digits(number: float | None) -> float | None:
    """Estimates have no more digits than these."""
    return None if number is None else float(f"{number:.4g}")


def _model(name: str) -> dict[str, Any]:
    inside = name.strip().lower() in model_names()
    return {"source": model_shape(name).source if inside else "", "quoted": shlex.quote(name)}


def _card(card: Device, setup: Setup) -> dict[str, Any]:
    shown = dataclasses.replace(setup, model="tightfit-demo", method="full", seq=LENGTHS[0])
    return {
        "name": card.name, "memory_bytes": card.memory_bytes, "usable_bytes": usable_bytes(card), "kind": card.kind,
        "source": card.source, "calibration": card.calibration, "notes": list(notes(shown, card)),
        "error_bar": error_bar(card), "quoted": shlex.quote(card.name),
        "rates": [max(card.flops_per_second.values()), card.memory_bytes_per_second],
    }  # fmt: skip


def _question(setup: Setup) -> dict[str, Any]:
    """The options that are the same for all answers, and how the command line says those that are not its own."""
    names = ("batch", "dtype", "optimizer", "rank", "trainer", "accumulate")
    found: dict[str, Any] = {name: getattr(setup, name) for name in names}
    plain = Setup(model="")
    options = []
    for name in names:
        if found[name] != getattr(plain, name):
            options.append(f"--{name}" if found[name] is True else f"--{name} {found[name]}")
    return {**found, "options": " ".join(options)}


def _said(question: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in question.items() if name != "options")
