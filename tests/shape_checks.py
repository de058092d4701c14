"""Checks the shapes and types in the annotations of a function, each time it is called."""

from beartype import beartype


def check_shapes(function):
    """Check a function; one inside another is made anew at each call, too costly to wrap."""
    return function if "<locals>" in function.__qualname__ else beartype(function)
