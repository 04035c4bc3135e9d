"""The program of one frame: its ops in order and what autograd saves, without any sizes."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch

from tightfit.core import (
    Program,
    Step,
)
from tightfit.trace.recorder import FrameRecord, Recorder


def program_of(recorder: Recorder, frame: FrameRecord, read: Container[int], held: Sequence[int]) -> Program:
    """What the frame does, in terms of its own values. Sets `frame.pinned` where the frame must not be replayed."""
    ordinal = {value: i for i, value in enumerate(frame.values)}
    steps = []
    for call_id in frame.calls:
        call = recorder.calls[call_id]
        reads: list[int] = []
        early: list[int] = []
        rerunnable = call.rerunnable
        for value, version in call.reads:
            if value in ordinal:
                (reads if version == frame.exit_versions[value] else early).append(ordinal[value])
            elif value in frame.effects:
                rerunnable = False
        steps.append(
            Step(
                name=call.name,
                kind=call.kind,
                reads=tuple(dict.fromkeys(reads)),
                reads_early=tuple(dict.fromkeys(early)),
                outputs=tuple(None if v is None else ordinal.get(v, -1) for v in call.outputs),
                writes=tuple(dict.fromkeys(ordinal[v] for v in (*call.fresh, *call.writes) if v in ordinal)),
                rerunnable=rerunnable,
            )
        )
    if frame.effects & set(frame.inputs):
        frame.pinned = "it changes one of its inputs in place"
    if any(recorder.storages[v].version != frame.exit_versions[v] for v in (*frame.values, *frame.inputs)):
        frame.pinned = frame.pinned or "something that it was given or made is changed in place after it returned"
    return Program(
        steps=tuple(steps),
        slots=tuple(ordinal.get(recorder.saved[s][0], -1) for s in frame.slots),
        wanted=tuple(s in read for s in frame.slots),
        values=len(frame.values),
        held=tuple(held),
    )


class ProgramRecorder:
    """Learns the program of one call of a function while it runs.

    Use as a context manager around the call and pass every tensor that autograd saves to `saw`.
    """

    def __init__(self) -> None:
        self._recorder = Recorder(dry=True)
        self._frame = FrameRecord(id=0, unit="region", inputs=())

    def __enter__(self) -> ProgramRecorder:
        self._recorder.frames.append(self._frame)
        self._recorder.open = self._frame
        self._recorder.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._recorder.__exit__(*error)
        self._recorder.open = None
        self._recorder.recording = False
        self._frame.exit_versions = {v: self._recorder.storages[v].version for v in self._frame.values}

    def saw(self, tensor: torch.Tensor) -> None:
        self._recorder.note_saved(tensor)

    def program(self) -> Program:
        """The program. Everything that was saved counts as needed, because no backward was seen yet."""
        return program_of(self._recorder, self._frame, range(len(self._recorder.saved)), ())
