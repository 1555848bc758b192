"""Recipes: the settings of a training and of the network that it begins with, in a YAML file."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kg_detectron.modeling.settings import from_plain, require
from kg_detectron.training.augmentation import ColourSettings, GeometrySettings


@dataclass(frozen=True)
class Recipe:
    """What a recipe says; what it leaves out keeps its default.

    Attributes:
        network: ``method``, and changes of the settings of its parts over those of the model that the training starts
            from, for example ``{"targets": {"radius": 3.0}}``. Names are those of the dataclass of each part.
        training: fields of `TrainSettings`.
        geometry, colours: the augmentation.

    Raises:
        ValueError: ``network`` or ``training`` is no mapping.
    """

    network: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    geometry: GeometrySettings = GeometrySettings()
    colours: ColourSettings = ColourSettings()

    def __post_init__(self) -> None:
        for name in ("network", "training"):
            require(isinstance(getattr(self, name), Mapping), name, "a mapping of settings", getattr(self, name))


class _Loader(yaml.SafeLoader):
    """Plain values only. Aliases are refused, for a few lines of them can stand for any amount of data."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed")
        return super().compose_node(parent, index)


# YAML 1.1 takes 1e-3 for text.
_EXPONENT = re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe, as data only.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not YAML, more than plain values, an unknown name, or a value out of its range; the message names
            the file.
    """
    text = Path(path).read_bytes()
    try:
        values = yaml.load(text, _Loader)  # a SafeLoader
        return from_plain(Recipe, {} if values is None else values)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as a recipe: {error}") from error
