"""Configuration keys of kg_detectron, added to Detectron2's defaults.

Keys of the models come from the dataclasses of their parts (`kg_detectron.modeling.settings`), where unit, range and
source of each are documented: under ``MODEL.CELLS`` those of the parts that methods share (`BackboneSettings`,
`TrunkSettings`, `SegmentationSettings`, `RankingSettings`), under ``INPUT`` those of `Preprocessing`, and under a node
of its own those of a method, for example ``MODEL.KEYPOINT_GRAPH`` (`HeadSettings`, `TargetSettings`,
`DecodingSettings`).
"""

from typing import Any, TextIO, TypeVar

import yaml
from detectron2.config import CfgNode as CN

from kg_detectron.modeling import Scores, method_class, method_names
from kg_detectron.modeling.settings import config_keys, parts
from kg_detectron.training.augmentation import ColourSettings, GeometrySettings

T = TypeVar("T")


class _LocalFiles(CN):
    """Reads configs without asking the network for them."""

    @classmethod
    def _open_cfg(cls, filename: str) -> TextIO:
        if "://" in filename:
            raise ValueError(f"{filename} was refused: a config is not downloaded, give it as a file")
        return open(filename, encoding="utf-8")


def merge_config(cfg: CN, file: str) -> None:
    """Merge a config file and its ``_BASE_`` into ``cfg`` (in place), read as data only.

    Raises:
        OSError: a file is missing.
        KeyError: a key that does not exist.
        ValueError: not YAML, more than data, or a ``_BASE_`` to be downloaded.
    """
    try:
        _LocalFiles.load_yaml_with_base(file, allow_unsafe=False)
        cfg.merge_from_file(file, allow_unsafe=False)
    except (yaml.YAMLError, AssertionError, AttributeError, TypeError) as error:
        raise ValueError(f"{file} cannot be used as a config: {error}") from error


def settings_of(cfg: CN, kind: type[T]) -> T:
    """The settings of a method, or of one part, that a config asks for.

    Args:
        kind: a dataclass of parts, such as `KeypointGraphSettings`, or a part, such as `BackboneSettings`.

    Raises:
        ValueError: a value that its part refuses.
    """
    children = dict(parts(kind))
    if children:
        return kind(**{name: settings_of(cfg, part) for name, part in children.items()})
    values: dict[str, Any] = {}
    for key, field in config_keys(kind):
        value = _get(cfg, key)
        values[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def method_settings(cfg: CN) -> Any:
    """The settings of the method ``MODEL.CELLS.METHOD`` that a config asks for."""
    return settings_of(cfg, method_class(cfg.MODEL.CELLS.METHOD).Settings)


def check_input(cfg: CN) -> None:
    """Refuse a config by which Detectron2's `DefaultPredictor` would change images before a model of ours sees them.

    Raises:
        ValueError: an image that comes resized, or with its channels in another order.
    """
    if cfg.INPUT.MIN_SIZE_TEST != 0:
        raise ValueError(
            f"INPUT.MIN_SIZE_TEST: expected 0, got {cfg.INPUT.MIN_SIZE_TEST}: the model scales images itself, and "
            "would find other cells in images that Detectron2 has resized"
        )
    if cfg.INPUT.FORMAT != "BGR":
        raise ValueError(f"INPUT.FORMAT: expected BGR, which the core's models take, got {cfg.INPUT.FORMAT!r}")


def put_settings(cfg: CN, settings: Any) -> None:
    """Write the settings of a method, or of one part, into a config (in place): what `settings_of` reads."""
    for name, _ in parts(type(settings)):
        put_settings(cfg, getattr(settings, name))
    for key, field in config_keys(type(settings)):
        _add(cfg, key, getattr(settings, field.name))


def initial_weights_keys() -> list[str]:
    """The keys that name initial weights of parts of the core's methods; "" is random ones."""
    settings = [part for method in method_names() for _, part in parts(method_class(method).Settings)]
    keys = [key for part in settings for key, field in config_keys(part) if field.metadata.get("initial")]
    return list(dict.fromkeys(keys))


def drop_initial_weights(cfg: CN) -> None:
    """Let every part start from random weights (in place): a checkpoint follows, nothing need be downloaded."""
    for key in initial_weights_keys():
        _add(cfg, key, "")


def _get(cfg: CN, key: str) -> Any:
    node = cfg
    for name in key.split("."):
        node = node[name]
    return node


def _add(cfg: CN, key: str, value: Any) -> None:
    *nodes, name = key.split(".")
    node = cfg
    for part in nodes:
        node = node.setdefault(part, CN())
    node[name] = list(value) if isinstance(value, tuple) else value


def add_kg_config(cfg: CN) -> None:
    """Add every key of kg_detectron, with its default, to a Detectron2 config (in place).

    The defaults are the paper's. Keys under ``INPUT``, ``SOLVER`` and ``TEST`` serve Mask R-CNN too.
    """
    cells = cfg.MODEL.CELLS = CN()
    # The method, by the name that it is registered under (`kg_detectron.modeling.methods`).
    cells.METHOD = "keypoint_graph"
    # Floating-point type of the convolutions in evaluation: float32, bfloat16 or float16; decoding always runs in
    # float32. For training there is SOLVER.AMP.
    cells.PRECISION = "float32"
    # Compile the dense modules with torch.compile: a minute at the first image, and a C++ compiler at hand.
    cells.COMPILED = False
    for method in method_names():
        for _, part in parts(method_class(method).Settings):
            for key, field in config_keys(part):
                _add(cfg, key, field.default)

    # How scores become probabilities, and the threshold that belongs to the weights (`Scores`); `model_zoo` sets them.
    for key, field in config_keys(Scores):
        _add(cfg, key, field.default)
    # The models have their own preprocessing: Detectron2's DefaultPredictor must not resize.
    cfg.INPUT.MIN_SIZE_TEST = 0

    # Channels-last tensors, in training and evaluation: a fifth faster on CPUs, the same results up to rounding.
    cfg.MODEL.CHANNELS_LAST = False

    # Datasets of the validation loss, which early stopping watches; empty computes none (the figures use TEST).
    cfg.DATASETS.VALIDATION = ()

    # Of training where INPUT.RESIZE is "isotropic": windows whose scale follows the size of the cells.
    for part in (GeometrySettings, ColourSettings):
        for key, field in config_keys(part):
            _add(cfg, key, field.default)
    # Of training where INPUT.RESIZE is "squeeze": the published augmentations (paper, section 3), each applied
    # with probability 1/2, or 0 where it is off.
    aug = cfg.INPUT.AUGMENTATION = CN()
    # Random expansion: the image surrounded by up to this many times its size; 1 is off.
    aug.EXPAND = 2.0
    # Random crop that keeps cells: smallest side, fraction of the image's; 1 is off.
    aug.CROP = 0.5
    # Random window of the resized image, pixels (height, width), always cut; (0, 0) is off. Training on windows sees
    # cells as large as in testing, for less.
    aug.WINDOW = (0, 0)
    # Horizontal and vertical flip.
    aug.FLIP = True
    # Contrast factor, lowest and highest; (1, 1) is off.
    aug.CONTRAST = (0.5, 1.5)
    # Brightness shift, grey levels of 255, either way; 0 is off.
    aug.BRIGHTNESS = 32.0
    # Random permutation of the colour channels.
    aug.PERMUTE_CHANNELS = True

    # Optimiser: "SGD" (Detectron2's) or "ADAM" (the paper's).
    cfg.SOLVER.OPTIMIZER = "ADAM"
    # Stop when the validation loss has not fallen by MIN_DELTA (a fraction of the best) over PATIENCE evaluations;
    # the evaluations come every TEST.EVAL_PERIOD iterations. PATIENCE 0 never stops.
    stop = cfg.SOLVER.EARLY_STOPPING = CN()
    stop.PATIENCE = 0
    stop.MIN_DELTA = 0.0

    # Intersections over union at which the paper's metrics are computed.
    cfg.TEST.PAPER_IOUS = [0.5, 0.7]
    # Detections an image that the COCO evaluator looks at (its own default, 100, fails crowded images).
    cfg.TEST.COCO_MAX_DETECTIONS = 10000
