"""What the scripts of this folder share: the command line, splits, and its last lines."""

import argparse
import os
import random
from collections.abc import Callable
from pathlib import Path

SPLITS = ("train", "val", "test")


def parser_of(description: str | None, name: str) -> argparse.ArgumentParser:
    """A parser with the option ``--output``, the root of all datasets, below which the script writes `name`."""
    parser = argparse.ArgumentParser(description=description)
    root = os.environ.get("DETECTRON2_DATASETS")
    parser.add_argument(
        "--output",
        type=Path,
        default=root,
        required=root is None,
        help=f"root of all datasets; {name}/ is written in it (default: $DETECTRON2_DATASETS)",
    )
    return parser


def add_splits(parser: argparse.ArgumentParser) -> None:
    """The options ``--splits`` and ``--seed``, one of them."""
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--splits", type=Path, help="folder with train.txt, val.txt and perhaps test.txt, one id a line")
    how.add_argument("--seed", type=int, default=0, help="of a random 60/20/20 split, without --splits (default: 0)")


def run(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, name: str, make: Callable[[], dict[str, list[int]]]
) -> dict[str, list[int]]:
    """Make a dataset and print the numbers of its images and cells.

    Args:
        name: the dataset's folder in ``arguments.output``.
        make: gives, for every split, the number of cells of every image.

    Returns:
        What `make` gives.

    Raises:
        SystemExit: with a message, where `make` raises a ValueError or an OSError.
    """
    try:
        counts = make()
    except (ValueError, OSError) as error:
        raise SystemExit(f"{parser.prog}: error: {error}") from error
    for split, cells in counts.items():
        empty = f", {cells.count(0)} images without a cell" if 0 in cells else ""
        print(f"{arguments.output / name}: {split}: {len(cells)} images, {sum(cells)} cells{empty}")
    return counts


def read_splits(folder: Path) -> dict[str, list[str]]:
    """Read ``train.txt``, ``val.txt`` and, where there is one, ``test.txt``: one id a line.

    Raises:
        FileNotFoundError: train.txt or val.txt is missing.
        ValueError: an id stands twice.
    """
    splits: dict[str, list[str]] = {}
    seen: dict[str, str] = {}
    for split in SPLITS:
        path = folder / f"{split}.txt"
        if split == "test" and not path.exists():
            continue
        splits[split] = path.read_text(encoding="utf-8").split()
        for id in splits[split]:
            if id in seen:
                raise ValueError(f"{path}: the id {id} stands in {seen[id]}.txt already")
            seen[id] = split
    return splits


def draw_splits(ids: list[str], seed: int) -> dict[str, list[str]]:
    """Split at random, 60 % train, 20 % val, 20 % test; the same for the same ids and seed."""
    ids = sorted(ids)
    random.Random(seed).shuffle(ids)
    fifth = round(len(ids) / 5)
    train = len(ids) - 2 * fifth
    return {"train": ids[:train], "val": ids[train : train + fifth], "test": ids[train + fifth :]}
