"""Benchmarks: of the operators, of whole models stage by stage, of prediction in tiles."""
