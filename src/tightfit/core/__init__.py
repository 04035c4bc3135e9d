"""The nouns: errors, sizes, levers, recorded steps, plans, results, and how they are written down.

Invariant: no torch here, and nothing of the rest of tightfit. Types are frozen dataclasses, quantities end in their
unit, and every type survives a round trip through JSON.
"""
