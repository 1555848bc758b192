"""What is computed of the tiles of a large image, kept on disk, so that a run which was stopped goes on there."""

import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kg_detectron.io.atomic import replacing

TILES = ".kg-detectron-tiles"  # folder in the folder of results


class TileStore:
    """Values by name, each in a file; several processes may ask for the same one at a time.

    Args:
        folder: made with the first value. It belongs to one image, model and choice of settings.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def part(self, name: str) -> "TileStore":
        """A store within this one."""
        return TileStore(self.folder / name)

    def get(self, name: str, compute: Callable[[], Any]) -> Any:
        """A value, of tensors, lists and dicts: the one that is kept, or else the one that is computed, and kept."""
        import torch  # takes seconds, and a run that has nothing to do only deletes

        from kg_detectron.io.safe_load import read_checkpoint

        path = self.folder / f"{name}.pt"
        if path.is_file():
            try:
                return read_checkpoint(path)
            except ValueError:  # damaged
                path.unlink(missing_ok=True)
            except FileNotFoundError:  # another process took it for damaged
                pass
        value = compute()
        # A worker that was given up may still be at the same value: each writes to a name of its own.
        with replacing(path, temporary=f".{path.name}.{uuid.uuid4().hex}") as unfinished:
            torch.save(value, unfinished)
        return value

    def discard(self) -> None:
        """Delete all values."""
        shutil.rmtree(self.folder, ignore_errors=True)
