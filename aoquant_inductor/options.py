"""What the user wrote -> validated, frozen options.

JSON values only, so that a file and the minifier can hold them.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from pydantic import BaseModel, ValidationError

from aoquant_inductor.errors import (
    ConflictingSchemes,
    OptionError,
    UnmatchedPattern,
    bad_value,
    check_value,
    did_you_mean,
    show,
)
from aoquant_inductor.scheme import Scheme, is_dict_scheme, resolve


@dataclass(frozen=True)
class Choice:
    """The scheme of one weight and what chose it: a key of `schemes`, "default", or None: nothing did."""

    scheme: Scheme | None
    matched_by: str | None


class Options(BaseModel, frozen=True, extra="forbid", strict=True):
    """Validated options, hashable. `schemes` keeps the user's order: the precedence of the patterns."""

    schemes: tuple[tuple[str, Scheme | None], ...] = ()
    default: Scheme | None = None
    on_unmatched: Literal["error", "warn"] = "error"
    on_unsupported: Literal["report", "error"] = "report"
    weights: Literal["checked", "frozen"] = "checked"
    release_weights: bool | Literal["cpu"] = False
    mode: str | None = None
    # JSON text, not a dict: a dict would make the options mutable and unhashable.
    inductor_json: str = "{}"

    @property
    def inductor(self) -> Mapping[str, Any]:
        """Inductor config key -> value, a fresh copy; `mode` is not expanded into it."""
        patches: dict[str, Any] = json.loads(self.inductor_json)
        return patches

    def key(self) -> str:
        """Canonical JSON of everything chosen: equal options, equal text, in every process."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    def choose(self, names: Sequence[str]) -> Choice:
        """The choice for one weight that goes by all of `names`: exact name, first pattern, then default.

        The default gives way to a key that names any of them.
        Raises: ConflictingSchemes when keys give two of the names different schemes.
        """
        found = [(name, entry) for name in names if (entry := self._entry(name)) is not None]
        if not found:
            return Choice(self.default, "default" if self.default else None)
        first_name, (first_key, first) = found[0]
        for name, (key, scheme) in found[1:]:
            if scheme != first:
                raise ConflictingSchemes((first_name, first_key, _name(first)), (name, key, _name(scheme)))
        return Choice(first, first_key)

    def _entry(self, name: str) -> tuple[str, Scheme | None] | None:
        exact = (entry for entry in self.schemes if entry[0] == name)
        patterns = (entry for entry in self.schemes if _matches(entry[0], name))
        return next(exact, None) or next(patterns, None)

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """The keys of `schemes` that name none of these linears."""
        names = list(names)
        return [key for key, _ in self.schemes if not any(_matches(key, name) for name in names)]

    def check(self, linears: Iterable[str], others: Iterable[str] = ()) -> None:
        """Judges the keys over all linears of a module, and what else may turn out to be one.

        Raises: UnmatchedPattern, or warns instead, as `on_unmatched` says.
        """
        linears = list(linears)
        names = [*linears, *others]
        misses = {key: _nearest_linear(key, names) for key in self.unmatched(names)}
        if not misses:
            return
        error = UnmatchedPattern(misses, len(linears))
        if self.on_unmatched == "error":
            raise error
        for line in error.lines():
            warnings.warn(line, UserWarning, stacklevel=2)


OWN_KEYS = tuple(name for name in Options.model_fields if name != "inductor_json")
"""The option names that are aoquant's; every other one is an Inductor config key."""


def parse(options: Mapping[str, Any] | None, mode: str | None = None) -> Options:
    """The options of one `torch.compile` call; `mode` is its argument of that name.

    Raises: OptionError, or UnknownScheme for the name of a scheme.
    """
    if not isinstance(options, Mapping | None):
        raise OptionError(f'options is {show(options)}; give a dict, as {{"schemes": "int8wo"}}.')
    given = dict(options or {})
    inductor = {key: given.pop(key) for key in list(given) if key not in OWN_KEYS}
    for key, value in inductor.items():
        _check_inductor_key(key)
        _check_inductor_value(key, value)
    for key, value in (given | inductor).items():
        _check_json(value, key)
    given["mode"] = _mode(mode, given.get("mode"))
    given["schemes"], given["default"] = _schemes(given)
    # torch.compile reads a "-" in a config key as "_"; config.patch does not.
    patches = {key.replace("-", "_"): value for key, value in inductor.items()}
    given["inductor_json"] = json.dumps(patches, sort_keys=True, default=dict)
    try:
        return Options(**given)
    except ValidationError as error:
        raise _option_error(error) from None


def _schemes(given: Mapping[str, Any]) -> tuple[tuple[tuple[str, Scheme | None], ...], Scheme | None]:
    schemes, default = given.get("schemes", {}), given.get("default")
    if not given.keys() & {"schemes", "default"}:
        default = "int8wo"
    if isinstance(schemes, str):
        if default is not None:
            raise OptionError(f'"schemes" is "{schemes}", one word for all linears: leave "default" out.')
        return (), resolve(schemes, "schemes")
    if not isinstance(schemes, Mapping):
        raise OptionError(f'"schemes" is {show(schemes)}; give one word, or a dict of names and patterns.')
    if is_dict_scheme(schemes):
        raise OptionError('"schemes" holds the keys of one scheme, no names of linears: for all, give it as "default".')
    for key in schemes:
        _check_pattern(key)
    entries = ((key, None if word is None else resolve(word, key)) for key, word in schemes.items())
    return tuple(entries), None if default is None else resolve(default, "default")


def _mode(argument: str | None, option: object) -> str | None:
    if argument is not None and option is not None and argument != option:
        raise OptionError(f"mode is {show(argument)} as an argument and {show(option)} in options; give one.")
    mode = option if argument is None else argument
    if mode is None:
        return None
    from aoquant_inductor import _inductor

    check_value("mode", mode, _inductor.mode_names())
    return str(mode)


def _check_inductor_key(key: object) -> None:
    from aoquant_inductor import _inductor

    if isinstance(key, str) and _inductor.is_config_key(key):
        return
    hint = did_you_mean(key, OWN_KEYS) or did_you_mean(key, _inductor.config_keys())
    known = ", ".join(OWN_KEYS)
    raise OptionError(f"unknown option {show(key)}{hint}. Known: {known}, and every Inductor config key.")


def _check_inductor_value(key: str, value: object) -> None:
    from aoquant_inductor import _inductor

    kind = _inductor.config_type(key)
    if kind is not None and not isinstance(value, kind):
        raise OptionError(f'"{key}" is {show(value)}; Inductor takes {kind.__name__} there.')


def _check_json(value: object, path: str) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise OptionError(f'"{path}" has the key {show(key)}; a key is a string.')
            _check_json(inner, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _check_json(inner, path)
    elif isinstance(value, float) and math.isfinite(value):
        return
    elif not isinstance(value, (str, int, type(None))):
        raise OptionError(
            f'"{path}" is {show(value)}; give what JSON holds: text, number, bool, list or dict.'
        )


def _option_error(error: ValidationError) -> OptionError:
    first = error.errors()[0]
    key = str(first["loc"][0])
    return bad_value(key, first["input"], _values(Options.model_fields[key].annotation))


def _values(annotation: Any) -> tuple[object, ...]:
    """What an annotation of literals and bools allows."""
    if annotation is bool:
        return (True, False)
    return tuple(value for one in get_args(annotation) for value in (_values(one) or (one,)))


def _check_pattern(key: str) -> None:
    if key.startswith("re:"):
        try:
            re.compile(key[3:])
        except re.error as error:
            raise OptionError(f'"{key}" is not a regular expression: {error}.') from error


def _matches(key: str, name: str) -> bool:
    if key.startswith("re:"):
        return re.fullmatch(key[3:], name) is not None
    return key == name or fnmatchcase(name, key)


def _name(scheme: Scheme | None) -> str | None:
    return scheme.name if scheme else None


def _nearest_linear(key: str, names: Sequence[str]) -> str | None:
    """The name whose dotted parts are most like the literal parts of a key; a tie goes to the whole text."""
    # A wildcard stands for any length, so a ratio over the whole text would favour the shortest name.
    parts = re.findall(r"\w+", re.sub(r"\\.", " ", key.removeprefix("re:"), flags=re.DOTALL))
    of_names = {name: name.split(".") for name in names}
    known = {part for split in of_names.values() for part in split}
    ratio = {(part, one): SequenceMatcher(None, one, part).ratio() for part in parts for one in known}
    scores = {
        name: sum(max(ratio[p, one] for one in split) for p in parts) for name, split in of_names.items()
    }
    best = max(scores.values(), default=0.0)
    equals = [name for name, score in scores.items() if score == best]
    return max(equals, key=lambda name: SequenceMatcher(None, name, key).ratio(), default=None)
