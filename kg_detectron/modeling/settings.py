"""Settings of the parts of a model: each is stated once, in the frozen dataclass of its part.

Constructors take these dataclasses; the Detectron2 config, the model file and the command line derive their names and
defaults from them. A part names its node of the config in ``NODE``; the key of a field is its name in capitals, unless
the field's metadata gives another one as ``key``.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Protocol, TypeVar


class Part(Protocol):
    """A frozen dataclass of the settings of one part, which checks its values when it is made."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


T = TypeVar("T")


def require(condition: bool, name: str, expected: str, value: object) -> None:
    """Raise a ValueError that names a setting, what was expected and what came, unless the condition holds."""
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def to_plain(settings: Part) -> dict[str, Any]:
    """Settings as nested dicts of numbers, strings, booleans, None and lists: what JSON and YAML hold."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return [plain(item) for item in value] if isinstance(value, tuple | list) else value

    return plain(settings)


def from_plain(kind: type[T], values: Mapping[str, Any]) -> T:
    """Settings from nested dicts; what is missing keeps its default.

    Raises:
        ValueError: a name that does not exist, or a value that its part refuses.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{kind.__name__}: expected a mapping of settings, got {values!r}")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]  # a dataclass
    unknown = sorted(values.keys() - fields.keys())
    if unknown:
        raise ValueError(f"{kind.__name__}: unknown settings {', '.join(unknown)}")
    given = {}
    for name, value in values.items():
        part = fields[name].type
        if isinstance(part, type) and dataclasses.is_dataclass(part):
            value = from_plain(part, value)
        elif isinstance(value, list):
            value = tuple(value)
        given[name] = value
    return kind(**given)


def replaced(settings: T, changes: Mapping[str, Any]) -> T:
    """Settings with some changed, which are named as in `to_plain`.

    Raises:
        ValueError: a name that does not exist, or a value that its part refuses.
    """

    def merged(old: Any, new: Any) -> Any:
        if not (isinstance(old, dict) and isinstance(new, Mapping)):
            return new
        return old | {name: merged(old.get(name), value) for name, value in new.items()}

    plain: Any = settings
    return from_plain(type(settings), merged(to_plain(plain), changes))


def parts(kind: type) -> Iterator[tuple[str, type]]:
    """(name, dataclass) of each part of the settings of a method."""
    for field in dataclasses.fields(kind):
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            yield field.name, field.type


def config_keys(part: type) -> Iterator[tuple[str, "dataclasses.Field[Any]"]]:
    """(full key of the Detectron2 config, field) of each setting of a part; none for parts without a ``NODE``."""
    node = getattr(part, "NODE", None)
    if node is None:
        return
    for field in dataclasses.fields(part):
        yield field.metadata.get("key", f"{node}.{field.name.upper()}"), field
