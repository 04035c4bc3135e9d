"""One training step of any model, before anything is planned: call it, look at its modules, change it and put it back.

Invariant: what is changed here is given back exactly. Nothing here knows of traces or plans.
"""
