"""Text that anybody may have written, read without trust: JSON and YAML that are too large, nested too deep, or hold
what the project's own files never do (NaN, a key twice, YAML's aliases) are refused before they cost time or memory.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from reprlib import Repr
from typing import Any

import yaml

LARGEST_JSON = 2**23  # bytes; parsed, these become at most some hundred megabytes
LARGEST_YAML = 2**15  # bytes: PyYAML takes seconds for these
DEEPEST = 100  # levels
LARGEST_NUMBER = 1e18  # of counts, times and costs; sums, products and percentages of such numbers are finite
LONGEST_SETTING, LONGEST_LIST = 4096, 1000  # characters of a path; values
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlist = _SHORT.maxtuple = 20
shortened = _SHORT.repr  # of a value, for a message, however large it is
_YAML_DAMAGE = (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, OverflowError)  # of its constructors


def read_text(path: Path, largest: int) -> str:
    """A text file.

    Args:
        path: anything but a file (a folder, a pipe) is refused.
        largest: bytes that it may have.

    Raises:
        OSError: if it is missing or cannot be read.
        ValueError: if it is larger, no file, or no UTF-8.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is no file")
    with path.open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"it has more than {largest} bytes")
    return content.decode()


def parse_json(text: str, shape: Any = None, largest: float = LARGEST_NUMBER) -> Any:
    """Plain data from JSON.

    Args:
        text: at most LARGEST_JSON characters.
        shape: see `check_shape`.
        largest: magnitude of a number.

    Raises:
        ValueError: for anything but finite, not too deep JSON of this shape.

    >>> parse_json('{"macs": 0.5}', {"macs": float})
    {'macs': 0.5}
    """
    if len(text) > LARGEST_JSON:
        raise ValueError(f"it has more than {LARGEST_JSON} characters")
    try:
        data = json.loads(text, parse_constant=_no_number, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels") from error
    _check_values(data, largest)
    check_shape(data, shape)
    return data


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"a key stands twice: {shortened(key)}")
    return found


def _check_values(data: Any, largest: float) -> None:
    """Refuse what is nested too deep, numbers that are too large, and text that cannot be written."""
    waiting = [(data, 0)]
    while waiting:
        value, depth = waiting.pop()
        if depth > DEEPEST:
            raise ValueError(f"it is nested deeper than {DEEPEST} levels")
        if isinstance(value, dict):
            waiting += [(one, depth + 1) for pair in value.items() for one in pair]
        elif isinstance(value, list):
            waiting += [(one, depth + 1) for one in value]
        elif isinstance(value, str):
            value.encode()  # a lone surrogate is an UnicodeEncodeError, which is a ValueError
        elif isinstance(value, int | float) and not (abs(value) <= largest and abs(value) != math.inf):
            raise ValueError("a number is too large")


def bounded(numbers: Iterable[float]) -> bool:
    """Whether all are finite and at most LARGEST_NUMBER, of either sign."""
    return all(abs(number) <= LARGEST_NUMBER for number in numbers)


def check_shape(data: Any, shape: Any, place: str = "it") -> None:
    """Refuse data of another shape.

    Args:
        data: plain data.
        shape: None for anything; a type, where float takes whole numbers too; [shape] for a list; {name: shape} for an
            object with at least these names; {str: shape} for one with any names.
        place: of the data, for the message.

    Raises:
        ValueError: naming the first place that differs.
    """
    if isinstance(shape, dict):
        _check_kind(data, dict, place)
        for key in data if str in shape else shape:
            if key not in data:
                raise ValueError(f"{place} lacks {key}")
            check_shape(data[key], shape[str if str in shape else key], f"{key!s:.80}")
    elif isinstance(shape, list):
        _check_kind(data, list, place)
        for item in data:
            check_shape(item, shape[0], f"an entry of {place}")
    elif shape is not None:
        _check_kind(data, shape, place)


def _check_kind(data: Any, kind: type, place: str) -> None:
    fits = isinstance(data, (int, float) if kind is float else kind)
    if not fits or (isinstance(data, bool) and kind is not bool):
        raise ValueError(f"{place} must be {_KINDS[kind]}, but got {shortened(data)}")


_KINDS = {
    dict: "an object",
    list: "a list",
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
}


def parse_settings(text: str) -> dict[str, Any]:
    """Settings from YAML: names, each with a number, a text, true, false, null or a list of these.

    Raises:
        ValueError: for anything else.
    """
    try:
        _check_events(text)
        settings = yaml.safe_load(text)
    except _YAML_DAMAGE as error:
        raise ValueError(f"{error!s:.300}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"it must hold lines like `episodes: 900`, but got {shortened(settings)}")
    wrong = [f"{shortened(key)}: {shortened(value)}" for key, value in settings.items() if not _is_setting(key, value)]
    if wrong:
        raise ValueError(f"a setting is a number, a text or a list of these, but got {', '.join(wrong[:5])}")
    return settings


def _check_events(text: str) -> None:
    """Refuse aliases and depth event by event: PyYAML itself would take minutes, or all memory."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > 2 or isinstance(event, yaml.AliasEvent):
            raise ValueError("settings are names with values or lists of values, without aliases (*name)")


def _is_setting(key: Any, value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return isinstance(key, str) and len(values) <= LONGEST_LIST and all(map(_is_plain, values))


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return value.isprintable() and len(value) <= LONGEST_SETTING
    return value is None or isinstance(value, float) or (isinstance(value, int) and value.bit_length() < 64)
