"""What would make a step fit, where no plan does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tightfit.core import (
    Category,
    Timeline,
    Trace,
    format_bytes,
)


def advice_for(trace: Trace, line: Timeline, budget_bytes: int) -> tuple[str, ...]:
    """What would make the step fit, each change with its number. Activations and logits are taken to grow with the
    batch and the sequence."""
    fixed = sum(trace.static_bytes.values())
    at_peak = {c: rows[line.peak_event] for c, rows in line.by_category.items()}
    gradients = at_peak[Category.GRADIENTS.value] - trace.static_bytes.get(Category.GRADIENTS.value, 0)
    moving = line.peak_bytes - fixed - gradients
    said = []
    if budget_bytes <= fixed and line.peak_bytes < fixed:
        pass  # the plan has some of it wait elsewhere, and what is left does not grow with the batch
    elif budget_bytes <= fixed:
        said.append(f"parameters, optimizer state and inputs alone take {format_bytes(fixed)}")
    else:
        share = (budget_bytes - fixed - gradients) / max(1, moving)
        batch = _rows(trace.batch_sizes)
        if batch > 1 and share * batch >= 1:
            fewer = int(share * batch)
            needed = fixed + gradients + moving * fewer / batch
            said.append(f"a batch of {fewer} instead of {batch} would need about {format_bytes(needed)}")
        if 0.05 < share < 0.995:
            said.append(f"sequences of {share:.0%} of this length would fit, about")
    pinned = [unit for unit in trace.units if unit.pinned]
    if pinned:
        reason = Counter(unit.pinned for unit in pinned).most_common(1)[0][0]
        said.append(
            f"{len(pinned)} of {len(trace.units)} units are kept whole, as {pinned[0].path or 'the model'}: {reason}"
        )
    state = trace.static_bytes.get(Category.OPTIMIZER_STATE.value, 0)
    if state:
        said.append(f"an optimizer without state (sgd) would save {format_bytes(state)}")
    said.append(f"the peak is at: {line.peak_owner}")
    return tuple(said)


def _rows(sizes: Sequence[int]) -> int:
    """The batch as its user counts it: the leading size that most of its tensors have, of several the least. A tensor
    that holds all tokens in one row, or pairs of examples, says nothing of it."""
    counts = Counter(sizes)
    most = max(counts.values(), default=0)
    return min((size for size, count in counts.items() if count == most), default=1)
