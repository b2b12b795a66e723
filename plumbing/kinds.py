"""What a JSON text may hold: described beside the code that reads it, and checked once, before anything is used.

A description is a Kind, Many(description) for a list, or {"key": description} for an object. "key?" may be missing; "*"
describes every key that is not named: without it, no other is known.
"""

import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from plumbing.launch import UserError


class Kind(NamedTuple):
    words: str  # as a message calls it
    fits: Callable[[Any], bool]


class Many(NamedTuple):
    of: Any  # the description of each
    least: int = 0


def is_text(value) -> bool:
    """False also where a JSON escape left half a surrogate pair, which is a Python string but no Unicode text."""
    return isinstance(value, str) and value.encode(errors="replace").decode() == value


def whole(low: int, high: int = 2**63 - 1) -> Kind:
    return Kind(f"a whole number from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def one_of(*values) -> Kind:
    return Kind(" or ".join(map(json.dumps, values)), lambda value: value in values)


def is_number(value) -> bool:
    return type(value) in (int, float) and 0 <= value <= sys.float_info.max  # a whole number may be no float


def is_flag(value) -> bool:
    parts = value if isinstance(value, list) else [value]
    return all(part is None or isinstance(part, bool) or is_text(part) or is_number(part) for part in parts)


ANYTHING = Kind("anything", lambda value: True)
TEXT = Kind("Unicode text", is_text)
COUNT, SEED = whole(1), whole(0, 2**32 - 1)
NUMBER = Kind("a number of at least 0", is_number)
FLAG = Kind("the value of a flag", is_flag)


def misfit(value, description, name: str = "") -> str | None:
    """The first thing that does not fit, such as "code_dim is a list, and should be ..."; None if all fits."""
    if isinstance(description, Kind) and description.fits(value):
        return None
    if isinstance(description, Many) and isinstance(value, list) and len(value) >= description.least:
        found = (misfit(part, description.of, f"{name}{place}.") for place, part in enumerate(value))
        return next(filter(None, found), None)
    if isinstance(description, dict) and isinstance(value, dict):
        return misfit_in_object(value, description, name)
    return f"{name[:-1] or 'all of it'} is {shown(value)}, and should be {words_of(description)}"


def misfit_in_object(value: dict, description: dict, name: str) -> str | None:
    known = {key.removesuffix("?"): inner for key, inner in description.items()}
    for key in description:
        if key not in value and key != "*" and not key.endswith("?"):
            return f"{name}{key} is missing"
    for key, part in value.items():
        if key not in known and "*" not in known:
            return f"{name}{shown(key)[1:-1]} is not known here"
        problem = misfit(part, known.get(key, known.get("*")), f"{name}{key}.")
        if problem:
            return problem
    return None


def shown(value) -> str:
    return {dict: "an object", list: "a list"}.get(type(value)) or json.dumps(value)[:60]


def words_of(description) -> str:
    if isinstance(description, Many):
        return f"a list of at least {description.least}" if description.least else "a list"
    return "an object" if isinstance(description, dict) else description.words


def parse(text: str, description, source: str):
    """The value of a JSON text. Raises UserError, which starts with `source`, if the description does not allow it."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise UserError(f"{source}: not JSON that can be read (it is nested too deeply)") from None
    except json.JSONDecodeError as error:
        line = f" of line {error.lineno}" if "\n" in text.strip() else ""
        raise UserError(f"{source}: not JSON ({error.msg}, character {error.colno}{line})") from None
    except ValueError:  # the only other one
        raise UserError(f"{source}: not JSON that can be read (a number has thousands of digits)") from None
    check(value, description, source)
    return value


def check(value, description, source: str) -> None:
    """Raises UserError, which starts with `source`, for what the description does not allow."""
    problem = misfit(value, description)
    if problem:
        raise UserError(f"{source}: {problem}")
