"""A simulated step for tools that people already have: Perfetto, PyTorch's memory_viz, an issue's Markdown.

Invariant: what is written is the referee's own sequence of blocks; nothing is read back. Refused: nothing.
Formats: the Chrome trace event format (counter events), and the dictionary that `torch.cuda.memory._dump_snapshot`
pickles (`device_traces` with alloc and free entries, `segments` as they are at the end), which
https://pytorch.org/memory_viz opens. The pickle is only ever written here, never loaded.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from typing import Any

from tightfit.core import Plan, Timeline, Trace, format_bytes
from tightfit.device.allocator import MIN_BLOCK_BYTES
from tightfit.plan.simulate import allocations

__all__ = ["chrome_trace", "markdown", "memory_snapshot"]

#: Events have no clock in a simulation: each is a microsecond after the one before.
_TICK_MICROSECONDS = 1


def chrome_trace(line: Timeline) -> dict[str, Any]:
    """Live bytes by category as counters, and each op as a slice; opens in ui.perfetto.dev and chrome://tracing."""
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 1, "tid": 1, "name": "process_name", "args": {"name": "tightfit: one simulated step"}}
    ]
    for i, label in enumerate(line.labels):
        at = i * _TICK_MICROSECONDS
        events.append({"ph": "X", "pid": 1, "tid": 1, "ts": at, "dur": _TICK_MICROSECONDS, "name": label})
        bytes_now = {category: rows[i] for category, rows in line.by_category.items() if any(rows)}
        events.append({"ph": "C", "pid": 1, "ts": at, "name": "live bytes", "args": bytes_now})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def memory_snapshot(trace: Trace, plan: Plan | None = None) -> bytes:
    """A pickle of the step's allocations and releases, as memory_viz reads them."""
    static, step = allocations(trace, plan)
    entries: list[dict[str, Any]] = []
    addresses: dict[Any, tuple[int, int, str]] = {}
    free: dict[int, list[int]] = {}
    base = top = 1 << 20

    def take(key: Any, size: int, name: str) -> None:
        nonlocal top
        if free.get(size):
            address = free[size].pop()
        else:
            address, top = top, top + -(-size // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES
        addresses[key] = (address, size, name)
        entries.append({"action": "alloc", "addr": address, "size": size, "stream": 0, "frames": _frames(name)})

    for i, size in enumerate(static):
        take(("static", i), size, "lives through the step")
    for key, size in step:
        if size > 0:
            take(key, size, _name(trace, key))
        elif key in addresses:
            address, held, _ = addresses.pop(key)
            free.setdefault(held, []).append(address)
            for action in ("free_requested", "free_completed"):
                entries.append({"action": action, "addr": address, "size": held, "stream": 0, "frames": []})
    segment = _segment(base, top, sorted(addresses.values()))
    first = {"action": "segment_alloc", "addr": base, "size": top - base, "stream": 0, "frames": []}
    entries.insert(0, first)
    for i, entry in enumerate(entries):
        entry["time_us"] = i * _TICK_MICROSECONDS
    return pickle.dumps(
        {"segments": [segment], "device_traces": [entries], "allocator_settings": {}, "external_annotations": []}
    )


def _frames(name: str) -> list[dict[str, Any]]:
    return [{"name": name, "filename": "tightfit", "line": 0}]


def _segment(base: int, top: int, live: Sequence[tuple[int, int, str]]) -> dict[str, Any]:
    """The one segment that all blocks lie in, as the step leaves it; `live`: addresses, sizes and names, in order."""
    blocks: list[dict[str, Any]] = []

    def add(address: int, end: int, asked: int, name: str) -> None:
        if end > address:
            blocks.append(
                {"address": address, "size": end - address, "requested_size": asked, "frames": _frames(name),
                 "state": "active_allocated" if asked else "inactive"}
            )  # fmt: skip

    at = base
    for address, size, name in live:
        add(at, address, 0, "free")
        at = address + -(-size // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES
        add(address, at, size, name)
    add(at, top, 0, "free")
    held = sum(block["size"] for block in blocks if block["state"] == "active_allocated")
    return {
        "device": 0, "address": base, "total_size": top - base, "allocated_size": held, "active_size": held,
        "requested_size": sum(size for _, size, _ in live), "stream": 0, "segment_type": "large",
        "segment_pool_id": (0, 0), "is_expandable": False, "frames": [], "blocks": blocks,
    }  # fmt: skip


def _name(trace: Trace, key: Any) -> str:
    if key[0] == "value":
        producer = trace.values[key[1]].producer
        if producer is not None:
            op = trace.ops[producer]
            return f"{op.phase.value} of {op.unit or 'outside the units'}: {op.name}"
    return {"copy": "made again by a replay", "scratch": "kernel scratch"}.get(key[0], "before the step")


def markdown(document: Mapping[str, Any]) -> str:
    """The answer and its figures for an issue or a pull request."""
    lines = [f"**{document['answer']}**", ""]
    facts = document.get("facts", {})
    if facts:
        lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items()), ""]
    checks = document.get("checks", [])
    if checks:
        lines += ["| check | expected | measured | |", "|---|---|---|---|"]
        lines += [
            f"| {c['name']} | {c['expected']} | {c['measured']} | {'passed' if c['passed'] else 'FAILED'} |"
            for c in checks
        ]
        lines.append("")
    points = document.get("study", {}).get("points", [])
    if points:
        lines += ["| plan | peak | slowdown | recompute |", "|---|---|---|---|"]
        lines += [
            f"| {p['name']} | {format_bytes(p['peak_bytes'])} | {p['slowdown']:.2f} x | {p['recompute_share']:.0%} |"
            for p in points
        ]
        lines.append("")
    environment = document.get("environment", {})
    if environment:
        names = ("tightfit", "torch", "transformers", "python", "platform")
        lines.append("Environment: " + ", ".join(f"{n} {environment[n]}" for n in names if environment.get(n)))
    return "\n".join(lines) + "\n"
