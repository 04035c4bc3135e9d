"""YAML files of settings, read without running anything.

Idea: YAML lets a key stand twice and takes the last one in silence, so a setting that was meant may not be the one that
holds. Here that is an error. Merge keys (`<<: *base`) are no repetition: what a mapping says itself goes over them.

Invariant: only plain values come out (`yaml.SafeLoader`). Refused: a repeated key (`InvalidInput`, with both lines).
"""

from __future__ import annotations

from typing import Any

import yaml

from tightfit.core import InvalidInput

__all__ = ["parse_yaml"]


def parse_yaml(text: str, source: str) -> Any:
    """The document in `text`. Raises `InvalidInput` for a repeated key of `source`, `yaml.YAMLError` for no YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except _Repeated as error:
        raise InvalidInput(f"{source!r} gives {error}: keep one of them") from None


class _Repeated(Exception):
    """A key of one mapping, and the lines where it stands."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # untyped
    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in first:
                raise _Repeated(f"{key.value!r} twice (lines {first[name]} and {line})")
            first[name] = line
        return node
