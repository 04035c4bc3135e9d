"""YAML files of settings, read without running anything: the one reader of `train` and of `doctor`.

Idea: YAML lets a key stand twice and takes the last one in silence, so a setting that was meant may not be the one that
holds. Here that is an error. Merge keys (`<<: *base`) are no repetition: what a mapping says itself goes over them.

Invariant: only plain values come out (`yaml.SafeLoader`). Refused (`InvalidInput`, with the file and the line): what is
no YAML, a second document, a value that looks like a date or a number and is none, a repeated key (with both lines).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tightfit.core import InvalidInput

__all__ = ["read_yaml"]


def read_yaml(path: str | Path, what: str) -> Any:
    """The one document of a file. `what`: what the file is to the user, for messages."""
    name = repr(str(path))
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"cannot read the {what} {name}: it is not UTF-8 text (byte {error.start}): save it as UTF-8"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        raise InvalidInput(f"cannot read the {what} {name}: {getattr(error, 'strerror', None) or error}") from None
    try:
        return yaml.load(text, Loader=_Loader)
    except _Repeated as error:
        raise InvalidInput(f"{name} gives {error}: keep one of them") from None
    except _NoValue as error:
        raise InvalidInput(f"the {what} {name} has {error}") from None
    except RecursionError:
        raise InvalidInput(f"the {what} {name} is nested too deep") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InvalidInput(f"the {what} {name} is not YAML (line {line}): {error.reason}") from None
    except yaml.MarkedYAMLError as error:
        line = 1 if error.problem_mark is None else error.problem_mark.line + 1
        if error.context == "expected a single document in the stream":
            raise InvalidInput(
                f"the {what} {name} holds several YAML documents (another begins in line {line}): keep one in a file"
            ) from None
        raise InvalidInput(f"the {what} {name} is not YAML (line {line}): {error.problem or error}") from None


class _Repeated(Exception):
    """A key of one mapping, and the lines where it stands."""


class _NoValue(Exception):
    """What stands in which line, and why it is no value of the kind that it looks like."""


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

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, ArithmeticError, AttributeError) as error:
            # PyYAML goes by a value's looks and leaves the rest to Python, whose errors know neither file nor line
            kind = node.tag.rpartition(":")[2]
            why = f" ({error})" if isinstance(error, (ValueError, ArithmeticError)) else ""
            raise _NoValue(
                f"{node.value!r} in line {node.start_mark.line + 1}, which YAML takes for {_LOOKS.get(kind, kind)} "
                f"that it is not{why}: mend it, or put quotes around it if it is text"
            ) from None


#: Kinds of values in YAML, in words.
_LOOKS = {"timestamp": "a date", "int": "a whole number", "float": "a number", "bool": "true or false"}
