"""The former place of `kg_detectron.io.finding.find_inputs`."""

from kg_detectron.io.finding import Input, find_inputs

__all__ = ["Input", "find_inputs"]
