"""Checks of attributes of dataclasses, by name. Each error says what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeGuard


def is_integer(value: object) -> TypeGuard[int]:
    """Whether ``value`` is an int, but no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether ``value`` is an int or a float, but no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check(options: object, *names: str, expected: str, holds: Callable[[Any], bool]) -> None:
    """Raise a ValueError unless ``holds`` is true of each attribute.

    Args:
        options: Object with the attributes.
        *names: Names of the attributes.
        expected: The condition in words, after "must be".
        holds: The condition. It is false for NaN if it is a comparison.
    """
    for name in names:
        value = getattr(options, name)
        if not holds(value):
            raise ValueError(f"{name} must be {expected}, got {value!r}")


def check_positive_integers(options: object, *names: str) -> None:
    """Expect ints of at least 1."""
    check(options, *names, expected="a positive integer", holds=lambda value: is_integer(value) and value >= 1)


def check_at_least(options: object, *names: str, least: float) -> None:
    """Expect values >= ``least``; they must be numbers."""
    check(options, *names, expected=f"at least {least}", holds=lambda value: value >= least)


def check_positive(options: object, *names: str) -> None:
    """Expect values > 0; they must be numbers."""
    check(options, *names, expected="positive", holds=lambda value: value > 0)


def check_choice(options: object, name: str, choices: Collection[str]) -> None:
    """Expect one of ``choices``."""
    check(options, name, expected=f"one of {', '.join(choices)}", holds=lambda value: value in choices)
