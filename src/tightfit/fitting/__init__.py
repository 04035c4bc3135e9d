"""Put a model's step under a budget and keep it there.

`fit.fit` is the one call: trace, plan and apply, and plan again for a longer batch. `switches` has `enable`, `active`
and `disable`: checkpointing as a switch, on any model.

Invariant: what is taken off leaves the model as it was. Refused: what `trace` and `plan` refuse.
"""
