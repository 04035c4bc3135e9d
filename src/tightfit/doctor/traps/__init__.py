"""The traps, each with the probe that tells whether the installed versions have it, and what it looks at.

A probe does the thing on a tiny model and looks at the outcome: a gradient, a peak by the allocator's count, an
autograd node. It knows no version numbers. A run, a live model or a step's peak is only inspected.

Invariant: a probe leaves the random state and what is printed as they were. That it cannot run is never taken for a
clean bill: it is `CANNOT_TELL`, with the reason.
"""

from __future__ import annotations

from tightfit.doctor.traps.known import TRAPS, probed
from tightfit.doctor.traps.trap import Seen, Trap, Verdict, cannot_tell

__all__ = ["TRAPS", "Seen", "Trap", "Verdict", "cannot_tell", "probed"]
