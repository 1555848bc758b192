"""Colours of classes in results."""

from collections.abc import Sequence

# Okabe and Ito's, which people with any kind of colour vision tell apart; classes take them in turn.
COLOURS = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#0072b2", "#f0e442")


def class_colours(count: int, colours: Sequence[str] = ()) -> tuple[tuple[int, int, int], ...]:
    """(red, green, blue) of each class, 0..255.

    Args:
        count: of the classes.
        colours: of each, ``#rrggbb``; without any, those of `COLOURS` in turn.

    Example:
        >>> class_colours(2)
        ((86, 180, 233), (230, 159, 0))
    """
    chosen = colours or [COLOURS[i % len(COLOURS)] for i in range(count)]
    values = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in chosen]
    return tuple((red, green, blue) for red, green, blue in values)
