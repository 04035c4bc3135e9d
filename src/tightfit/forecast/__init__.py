"""Will it run? The step itself on fake tensors, with the plan applied, for a device that is not there.

The model is built on `meta` from its published shape or its `config.json`, with the method's adapters, 4-bit twins and
optimizer (`setup`). Its step is traced for the device's kernels, a few blocks of it and the rest by repetition
(`recording`). It is planned for the device's memory and laid out by the caching allocator's rules (`room`, `search`).
`answer` puts this together, `micro_batches` does so for a global batch that is cut, `advice` says what would make it
fit, `lengths` reads the longest sequence of a data set.
`survey` asks about many cards at once, and `site` does so for many models, methods and lengths.
`calibrating` measures the device that is here, and the figures take the place of the catalog's.
Seconds are a roofline over the catalog's rates and are only ever called estimated.

Invariant: no weights are ever allocated, nothing is downloaded but a hub id's config. "Fits" means that the reserved
bytes, the driver's context and the margin are within the card together. Refused: models whose step needs values that
fake tensors do not have (`Unsupported`), sizes that the model has no positions for (`InvalidInput`).
"""

from __future__ import annotations

from tightfit.forecast.answer import check, which_gpus
from tightfit.forecast.calibrating import Effort, calibrate, catalog_entry
from tightfit.forecast.lengths import longest_length
from tightfit.forecast.micro_batches import check_micro_batches
from tightfit.forecast.recording import trace_for, trace_setup
from tightfit.forecast.room import HERE, device_asked, usable_bytes
from tightfit.forecast.setup import Adapters, Progress, Setup, default_length
from tightfit.forecast.site import asked_of, gather
from tightfit.forecast.survey import survey

__all__ = [
    "HERE",
    "Adapters",
    "Effort",
    "Progress",
    "Setup",
    "asked_of",
    "calibrate",
    "catalog_entry",
    "check",
    "check_micro_batches",
    "default_length",
    "device_asked",
    "gather",
    "longest_length",
    "survey",
    "trace_for",
    "trace_setup",
    "usable_bytes",
    "which_gpus",
]
