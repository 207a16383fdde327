"""Everything aoquant raises about a user's input: one class per mistake, the way out in the message.

An error is built from facts (its `args`, so it survives pickling) and writes its own text; `OptionError`,
`UnsupportedTorch` and the base take a finished message.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence


class AoquantError(Exception):
    """Base of every error aoquant raises on purpose."""


class OptionError(AoquantError, ValueError):
    """An option, a scheme key or a value that aoquant does not know."""


class UnknownScheme(OptionError):
    """A scheme name neither canonical nor an alias. `nearest` is a name, or None when none is near."""

    def __init__(self, word: str, where: str, nearest: str | None, known: tuple[str, ...] = ()) -> None:
        super().__init__(word, where, nearest, known)
        self.word, self.where, self.nearest, self.known = word, where, nearest, known

    def __str__(self) -> str:
        text = f'unknown scheme "{self.word}"{place(self.where)}.'
        return text + (f" Nearest: {self.nearest}." if self.nearest else f" Known: {', '.join(self.known)}.")


class UnmatchedPattern(OptionError):
    """Keys of `schemes` that name none of the `seen` linears: key -> the nearest name, or None."""

    def __init__(self, misses: Mapping[str, str | None], seen: int) -> None:
        super().__init__(dict(misses), seen)
        self.misses, self.seen = dict(misses), seen

    def lines(self) -> list[str]:
        """One sentence or two for each key, without the way out."""
        return [
            f'"{key}" names none of the {self.seen} linears.' + (f" Nearest: {nearest}." if nearest else "")
            for key, nearest in self.misses.items()
        ]

    def __str__(self) -> str:
        return "\n".join(self.lines()) + ' Set on_unmatched="warn" to go on.'


class NothingQuantized(AoquantError, ValueError):
    """No linear was quantized: of `seen`, `matched` had a scheme; `reasons` counts why those were left."""

    def __init__(self, seen: int, matched: int, reasons: Mapping[str, int] | None = None) -> None:
        super().__init__(seen, matched, dict(reasons or {}))
        self.seen, self.matched, self.reasons = seen, matched, dict(reasons or {})

    def __str__(self) -> str:
        text = f"nothing was quantized: {self.seen} linears seen, {self.matched} matched"
        why = ", ".join(f"{reason}: {count}" for reason, count in self.reasons.items())
        return f"{text} ({why})." if self.matched and why else f"{text}."


class UnsupportedLayers(AoquantError, ValueError):
    """Linears that have a scheme and cannot have it, under on_unsupported="error": name -> why."""

    def __init__(self, layers: Mapping[str, str]) -> None:
        super().__init__(dict(layers))
        self.layers = dict(layers)

    def __str__(self) -> str:
        return "\n".join(f"{name} {why}" for name, why in self.layers.items()) + ' Set on_unsupported="report" to go on.'


class ShapeChanged(AoquantError, RuntimeError):
    """A packed weight was given data of another shape: `before`, `now`."""

    def __init__(self, before: tuple[int, ...], now: tuple[int, ...]) -> None:
        super().__init__(before, now)
        self.before, self.now = before, now

    def __str__(self) -> str:
        what = "has had another shape since" if self.now == self.before else f"has the shape {self.now} now"
        return (
            f"a weight that was packed as {self.before} {what}, by `.data =`. "
            "Give its module a new nn.Parameter: then it is compiled again."
        )


class ConflictingSchemes(AoquantError, ValueError):
    """Two names of one tied weight choose different schemes.

    A choice is (name, key that matched, scheme or None).
    """

    def __init__(self, first: tuple[str, str, str | None], second: tuple[str, str, str | None]) -> None:
        super().__init__(first, second)
        self.first, self.second = first, second

    def __str__(self) -> str:
        one, two = (f'{name} is {scheme} by "{key}"' for name, key, scheme in (self.first, self.second))
        return f"one tied weight, two schemes: {one}, {two}. Give both names the same scheme."


class ReleasedWeights(AoquantError, RuntimeError):
    """The original of a packed weight is wanted, and its memory was given back; `name` is its linear."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return (
            f'the original weight of "{self.name}" was released after packing ("release_weights" or load): only compiled '
            "quantized graphs can use it. aoquant_inductor.restore(model) brings it back."
        )


class CheckpointError(AoquantError, ValueError):
    """A file that cannot be loaded, or does not hold what the model needs."""

    def __init__(self, file: str, why: str) -> None:
        super().__init__(file, why)
        self.file, self.why = file, why

    def __str__(self) -> str:
        return f"{self.file}: {self.why}"


class UnsafeMachineCode(AoquantError, RuntimeError):
    """ptxas made wrong machine code of `kernel`, with these `hazards`; without any, it could not be read."""

    def __init__(self, kernel: str, hazards: Sequence[str]) -> None:
        super().__init__(kernel, list(hazards))
        self.kernel, self.hazards = kernel, list(hazards)

    def __str__(self) -> str:
        text = f"the machine code of {self.kernel} cannot be read, so that nobody knows whether ptxas made it right."
        if self.hazards:
            text = (
                f"ptxas made machine code of {self.kernel} that touches registers which the tensor core still works on, at "
                f'{len(self.hazards)} places, first "{self.hazards[0]}": its results would be wrong.'
            )
        return (
            f"{text} Set TRITON_PTXAS_PATH before Python starts (TRITON_PTXAS_BLACKWELL_PATH if Triton reads that for this "
            'card) to what `python -m aoquant_inductor.ptxas` prints after `pip install -U "aoquant-inductor[cuda]"`; or to a '
            "ptxas older than 13.3, with which other kernels are taken."
        )


class UnsupportedTorch(AoquantError, ImportError):
    """The installed torch is not one aoquant runs on."""


def place(where: str) -> str:
    """` for "where"`, or nothing for an empty place."""
    return f' for "{where}"' if where else ""


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known word most like `word` (difflib ratio, any case), or None below the cutoff."""
    spelling = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), spelling, n=1, cutoff=cutoff)
    return spelling[close[0]] if close else None


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """` (did you mean "x"?)`, or nothing when no known word is near."""
    close = nearest(word, known) if isinstance(word, str) else None
    return f' (did you mean "{close}"?)' if close else ""


def show(value: object) -> str:
    """A value as an error text quotes it: a string in double quotes, anything else as Python writes it."""
    return f'"{value}"' if isinstance(value, str) else repr(value)


def bad_value(key: str, value: object, known: Sequence[object], where: str = "") -> OptionError:
    """The error of a key whose value is not one of the known ones."""
    hint = did_you_mean(value, [one for one in known if isinstance(one, str)])
    listed = ", ".join(one if isinstance(one, str) else repr(one) for one in known)
    return OptionError(f'"{key}"{place(where)} is {show(value)}{hint}. Known: {listed}.')


def check_value(key: str, value: object, known: Sequence[object], where: str = "") -> None:
    """Raises `bad_value` unless the value is one of the known ones, type and all."""
    # True == 1 and 32.0 == 32 in Python: a wrong type would go through, into a name and a cache key.
    if not any(type(value) is type(one) and value == one for one in known):
        raise bad_value(key, value, known, where)
