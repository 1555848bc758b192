"""The version of the package, for those parts that must not import its face."""

__version__ = "0.2.0"
