"""The command ``kg-detectron``, a file a command."""

from kg_detectron.cli.main import main, program

__all__ = ["main", "program"]
