"""Entries of a trace, changed; and when garbage is looked for while many traces are made."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest

from tightfit.core import Event, EventKind, Saved, Value
from tightfit.core.changed import changed
from tightfit.plan.indexed import collecting_at_rests, rest


def test_a_changed_entry_is_what_dataclasses_would_give() -> None:
    value = Value(id=3, size_bytes=512, dtype="bfloat16", shape=(4, 64), producer=7, unit="layers.0", needed=True)
    for entry, fields in (
        (value, {}),
        (value, {"id": 4, "producer": None, "unit": None, "natural_end": 12}),
        (Saved(id=1, value=2, frame=None, ordinal=0, read=True), {"value": 5}),
        (Event(what=EventKind.FREE, subject=1), {"subject": 2}),
    ):
        before = dataclasses.asdict(entry)  # type: ignore[call-overload]
        made = changed(entry, **fields)
        assert made == dataclasses.replace(entry, **fields)  # type: ignore[type-var]
        assert made is not entry and dataclasses.asdict(entry) == before  # type: ignore[call-overload]


def test_what_does_more_than_setting_its_fields_is_refused() -> None:
    @dataclasses.dataclass(frozen=True)
    class Checked:
        number: int

        def __post_init__(self) -> None:
            assert self.number > 0

    with pytest.raises(TypeError, match="Checked does something after"):
        changed(Checked(1), number=-1)


class Holder:
    """What can be in a cycle."""

    def __init__(self) -> None:
        self.other: Holder | None = None


def cycle() -> weakref.ref[Holder]:
    one, two = Holder(), Holder()
    one.other, two.other = two, one
    return weakref.ref(one)


def test_garbage_is_looked_for_at_rests_and_what_survives_is_let_go_of_in_the_end() -> None:
    gc.unfreeze()  # what the tests' set-up froze
    gone = cycle()
    with collecting_at_rests():
        assert not gc.isenabled()
        rest()
        assert gone() is None and gc.get_freeze_count()
        with collecting_at_rests():
            pass
        assert gc.get_freeze_count() and not gc.isenabled()  # the outer one is open
    assert gc.isenabled() and not gc.get_freeze_count()
    gone = cycle()
    rest()  # nobody asked for rests
    assert gone() is not None and not gc.get_freeze_count()
    gc.collect()
    assert gone() is None


def test_what_the_caller_has_frozen_stays_frozen() -> None:
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        gone = cycle()
        with collecting_at_rests():
            rest()
            assert gone() is None and gc.get_freeze_count() <= frozen  # nor is anything of ours there for good
        assert frozen // 2 < gc.get_freeze_count() <= frozen  # what nothing refers to any more is gone
    finally:
        gc.unfreeze()
