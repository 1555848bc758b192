"""Labels in the colours of their classes."""

from collections.abc import Sequence

import numpy as np
from napari.utils.colormaps import DirectLabelColormap

# Of labels whose class nobody has stated, such as those that somebody draws.
_UNKNOWN = (1.0, 1.0, 1.0, 1.0)


def class_colormap(
    ids: np.ndarray, classes: np.ndarray, colours: Sequence[tuple[int, int, int]]
) -> DirectLabelColormap:
    """The colours of labels, as a labels layer takes them; other labels are white.

    Args:
        ids: (R,) integers, of the labels.
        classes: (R,) integers, the class of each, from 1.
        colours: (red, green, blue), 0..255, of the classes.
    """
    shades = {label: (*(value / 255 for value in colour), 1.0) for label, colour in enumerate(colours, start=1)}
    of_ids: dict[int | None, np.ndarray] = {0: np.zeros(4), None: np.array(_UNKNOWN)}
    for id_, label in zip(ids, classes, strict=True):
        of_ids[int(id_)] = np.array(shades[int(label)])
    return DirectLabelColormap(color_dict=of_ids)
