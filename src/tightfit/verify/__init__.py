"""Prove by measurement: the same gradients, a peak within budget, a prediction that held. `tightfit.verify` is this
package, called.

| module | what is proven or measured there |
|---|---|
| `proving` | the verb `verify`, and its gradient checks alone |
| `gradients` | loss, gradients and buffers of two runs, bit by bit |
| `float64`, `rounding` | steps that add in another order, against float64, and the limit of their error |
| `peak` | the peak of a whole step by the allocator's own count |
| `seconds` | steps with and without the plan, taken in turn |
| `measure` | the usual exercise: no checkpointing, every block, the plan, side by side |

Invariant: the model, its gradients, the optimizer's state and every random state are left as they were found.
Refused: nothing is passed on trust.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tightfit.core import make_verb

if TYPE_CHECKING:
    from tightfit.verify.proving import verify

__all__ = ["verify"]

make_verb(__name__, "tightfit.verify.proving")
