"""Values that several processes compute and read at a time."""

import threading
from pathlib import Path

import torch

from kg_detectron.inference.tile_store import TileStore


def test_a_value_that_is_computed_twice_at_a_time_is_kept_once(tmp_path: Path) -> None:
    """As by a worker that was given up, and is not dead."""
    store, together = TileStore(tmp_path / "tiles"), threading.Barrier(4)
    found: list[object] = []

    def compute() -> torch.Tensor:
        together.wait(10)
        return torch.arange(200_000)

    def ask() -> None:
        found.append(store.get("peaks", compute))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(torch.equal(value, torch.arange(200_000)) for value in found)
    assert [path.name for path in store.folder.iterdir()] == ["peaks.pt"]
    assert torch.equal(store.get("peaks", lambda: 0), torch.arange(200_000))


def test_a_damaged_value_is_computed_again(tmp_path: Path) -> None:
    store = TileStore(tmp_path)
    (tmp_path / "boxes.pt").write_bytes(b"PK\x03\x04")
    assert store.get("boxes", lambda: [1, 2]) == [1, 2]
    assert store.get("boxes", lambda: 0) == [1, 2]
    store.discard()
    assert not tmp_path.exists()
