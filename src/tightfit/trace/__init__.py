"""Record one training step: what ran, what lived, what autograd held.

`tightfit.trace` is this package, called.

| module | what is recorded there |
|---|---|
| `recording` | the verb `trace`: a step of a real model, or of a fake one |
| `passes`, `recorder` | the passes over the step, and the dispatch mode that records one pass |
| `profiler` | bytes by the allocator's own count |
| `timing` | an op's seconds, from timings that other processes disturb |
| `programs`, `assembly` | from a recorded pass to the programs of units, and to a `Trace` |
| `optimizer` | the optimizer's step, behind the trace |
| `units` | which modules are units, by the bytes that autograd saves in them |
| `fake`, `as_cuda` | a step of any size on fake tensors, with CUDA's kernels |
| `unroll` | a deep model's trace from a shallow one's; no torch |

Invariant: the model, its gradients, its buffers and every random state are left as they were found.
Refused: steps that are not the same twice, and what cannot be seen below autograd (`Unsupported`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tightfit.core import make_verb

if TYPE_CHECKING:
    from tightfit.trace.recording import trace

__all__ = ["trace"]

make_verb(__name__, "tightfit.trace.recording")
