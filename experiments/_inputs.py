"""Input checks that answer in one line: what was given, what was expected, the mend."""

import itertools
import math
from collections.abc import Sequence


class InputError(ValueError):
    """Bad input from a user: one line and exit status 2, never a traceback."""


def bad_input(name: str, got: object, expected: str, mend: str) -> InputError:
    """The error for an argument ``name``, worded alike everywhere."""
    return InputError(f"{name}: got {got!r}; expected {expected}; {mend}")


def check_integer(name: str, value: int, *, at_least: int, example: int) -> None:
    """Raise :class:`InputError` unless ``value >= at_least``."""
    if isinstance(value, bool) or value != int(value) or value < at_least:
        raise bad_input(
            name, value, f"an integer of at least {at_least}", f"try {name} = {example}"
        )


def check_finite(name: str, value: complex | Sequence[complex]) -> None:
    """Raise :class:`InputError` if ``value`` holds NaN or infinity."""
    values = value if isinstance(value, Sequence) else (value,)
    for entry in values:
        number = complex(entry)
        if not (math.isfinite(number.real) and math.isfinite(number.imag)):
            raise bad_input(name, entry, "finite numbers", "give an ordinary number")


def check_nonempty(name: str, values: Sequence[object], example: str) -> None:
    """Raise :class:`InputError` if ``values`` is empty."""
    if not values:
        raise bad_input(name, values, "at least one value", f"try {example}")


def check_increasing(name: str, values: Sequence[int], *, at_least: int) -> None:
    """Raise :class:`InputError` unless ``values`` are strictly increasing integers."""
    check_nonempty(name, values, f"{name} = {at_least} {2 * at_least + 1}")
    for value in values:
        check_integer(name, value, at_least=at_least, example=max(at_least, 16))
    if any(b <= a for a, b in itertools.pairwise(values)):
        mended = tuple(sorted(set(values)))
        raise bad_input(
            name,
            tuple(values),
            "values in strictly increasing order, each once",
            f"try {name} = {' '.join(map(str, mended))}",
        )


def check_powers_finite(name: str, decays: Sequence[complex], T: int) -> None:
    """Raise :class:`InputError` if |a|^T overflows float64 for some decay ``a``."""
    for a in decays:
        size = math.hypot(a.real, a.imag)  # abs() raises where this is infinite
        if size > 1 and T * math.log10(size) > 290:
            raise bad_input(
                name,
                a,
                f"|decay|^T within float64 at T = {T}, so |decay| below "
                f"{10 ** (290 / T):.6g}",
                "lower the decay or T",
            )
