"""The methods that exist, by the name that model files, configs and tools know them by."""

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from kg_detectron.modeling.instance_net import InstanceNet

# Packages that bring a method of their own name its module under this group of entry points.
ENTRY_POINTS = "kg_detectron.methods"

_METHODS: dict[str, "type[InstanceNet]"] = {}

Method = TypeVar("Method", bound="type[InstanceNet]")


def register_method(name: str) -> Callable[[Method], Method]:
    """Class decorator: make a method known under a name.

    Raises:
        ValueError: the name is another method's.
    """

    def register(method: Method) -> Method:
        known = _METHODS.get(name)
        if known is not None and known.__qualname__ != method.__qualname__:
            raise ValueError(f"method {name!r} is registered already, as {known.__qualname__}")
        method.method = name
        _METHODS[name] = method
        return method

    return register


def method_class(name: str) -> "type[InstanceNet]":
    """The class of a method.

    Raises:
        ValueError: no method of that name; the message lists the names.
    """
    if name not in _METHODS:
        for entry in entry_points(group=ENTRY_POINTS, name=name):
            entry.load()
    if name not in _METHODS:
        raise ValueError(f"method: expected one of {', '.join(sorted(_METHODS))}, got {name!r}")
    return _METHODS[name]


def method_names() -> list[str]:
    """The names of all methods, sorted: those that are registered, and those of installed packages."""
    for entry in entry_points(group=ENTRY_POINTS):
        if entry.name not in _METHODS:
            entry.load()
    return sorted(_METHODS)
