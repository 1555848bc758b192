"""What can be wrong with a dataset."""

from dataclasses import dataclass

# Kinds of faults, by which they are counted.
UNREADABLE = "unreadable file"
NO_PARTNER = "missing partner"
SIZE = "size mismatch"
NO_CELL = "empty"
SPLIT = "split label"
BINARY = "binary mask"
DUPLICATE_IMAGE = "duplicate image"
DUPLICATE_CELL = "duplicate cell"
# Those of a COCO JSON.
ENTRY = "malformed entry"
DUPLICATE_ID = "duplicate id"
UNKNOWN_ID = "unknown image or category"
FILE_NAME = "refused file name"
MISSING_IMAGE = "missing image"
MASK = "corrupt mask"
EMPTY_MASK = "empty mask"
BOX_AREA = "box without area"
BOX_OUTSIDE = "box outside its image"
BOX_OFF_MASK = "mask misses its box"


@dataclass(frozen=True)
class Fault:
    """Something wrong: its ``kind``, the file or entry ``where`` it is (or "", for the whole), and a ``text``."""

    kind: str
    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}" if self.where else self.text


class FaultError(ValueError):
    """Something wrong that ends the reading of an entry, and its ``kind``."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind
