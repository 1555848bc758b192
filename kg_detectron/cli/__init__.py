"""The command ``kg-detectron``, a file a command."""

from kg_detectron.cli.main import main

__all__ = ["main"]
