"""What can be wrong with a dataset."""

import enum
from collections.abc import Iterable
from dataclasses import dataclass


class Severity(enum.IntEnum):
    """What a fault means for a training.

    ``NOTE``: worth knowing, nothing is wrong. ``HARMLESS``: odd, or wrong and mended by `kg-detectron convert` and
    before a training; cells are neither lost nor falsified. ``FATAL``: a training would stop at it, or learn from
    wrong data.
    """

    NOTE = 0
    HARMLESS = 1
    FATAL = 2


# Kinds of faults, by which they are counted. Of images and masks:
UNREADABLE = "unreadable file"
NO_PARTNER = "missing partner"
SWAPPED = "images and masks swapped"
SIZE = "size mismatch"
NO_CELL = "empty"
SPLIT = "split label"
CORNERS = "label joined at corners"
BINARY = "binary mask"
NO_LABELS = "no label image"
BACKGROUND = "background is a cell"
FULL = "no background"
NO_MASK = "no mask of a cell"
INVERTED = "inverted mask"
GREY = "soft-edged mask"
DUPLICATE_IMAGE = "duplicate image"
DUPLICATE_CELL = "duplicate cell"
CHANNELS = "channels to choose"
LEVELS = "no fixed white level"
NO_VALUE = "no finite value"
ORIENTATION = "orientation"
# Of a COCO JSON:
ENTRY = "malformed entry"
INCOMPLETE = "incomplete entry"
DUPLICATE_ID = "duplicate id"
ID_ZERO = "annotation id 0"
UNKNOWN_ID = "unknown image or category"
CATEGORIES = "several categories"
CATEGORY_NAMES = "categories of one name"
NO_CATEGORY = "no category"
UNUSED_CATEGORY = "unused category"
CROWD = "crowd annotations"
FILE_NAME = "refused file name"
MISSING_IMAGE = "missing image"
MASK = "corrupt mask"
EMPTY_MASK = "empty mask"
BOX_AREA = "box without area"
BOX_OUTSIDE = "box outside its image"
BOX_OFF_MASK = "mask misses its box"

_LESS_THAN_FATAL = {
    NO_CELL: Severity.HARMLESS,  # teaches what is no cell
    SPLIT: Severity.HARMLESS,
    CORNERS: Severity.NOTE,
    FULL: Severity.NOTE,
    GREY: Severity.NOTE,
    DUPLICATE_IMAGE: Severity.HARMLESS,
    DUPLICATE_CELL: Severity.HARMLESS,
    LEVELS: Severity.HARMLESS,
    ORIENTATION: Severity.NOTE,
    INCOMPLETE: Severity.HARMLESS,
    DUPLICATE_ID: Severity.HARMLESS,
    ID_ZERO: Severity.HARMLESS,
    UNUSED_CATEGORY: Severity.HARMLESS,
    CATEGORIES: Severity.NOTE,
    NO_CATEGORY: Severity.NOTE,
}
# Kinds that a COCO file has no more when `coco.rewrite` has written it anew.
MENDED_BY_REWRITING = frozenset({INCOMPLETE, DUPLICATE_ID, ID_ZERO, UNUSED_CATEGORY})


@dataclass(frozen=True)
class Fault:
    """Something wrong.

    Attributes:
        kind: one of the constants of this module.
        where: the file or entry, or "" for the whole.
        text: what was expected and what came.
        remedy: what the user can do, or "".
        severity: by default that of the kind.
    """

    kind: str
    where: str
    text: str
    remedy: str = ""
    severity: Severity = None  # type: ignore[assignment]  # set below

    def __post_init__(self) -> None:
        if self.severity is None:
            object.__setattr__(self, "severity", _LESS_THAN_FATAL.get(self.kind, Severity.FATAL))

    def __str__(self) -> str:
        text = f"{self.where}: {self.text}" if self.where else self.text
        return f"{text}; {self.remedy}" if self.remedy else text


class FaultError(ValueError):
    """Something wrong that ends the reading of an entry, and its ``kind``."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def fatal(faults: Iterable[Fault]) -> list[Fault]:
    """Those that a training cannot go on with."""
    return [fault for fault in faults if fault.severity == Severity.FATAL]
