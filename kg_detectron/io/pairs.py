"""The former place of `kg_detectron.io.finding.find_pairs`."""

from kg_detectron.io.finding import LAYOUTS, Pair, find_pairs

__all__ = ["LAYOUTS", "Pair", "find_pairs"]
