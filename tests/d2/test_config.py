"""Keys of the config: derived from the settings of the parts, and back."""

import pytest
from builders import TINY, keypoint_graph_settings, small_config
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from kg_detectron.d2 import add_kg_config
from kg_detectron.d2.config import method_settings, settings_of
from kg_detectron.modeling import method_class, method_names
from kg_detectron.modeling.settings import config_keys, parts


def every_key() -> list:
    """(key, field) of every setting of every method."""
    return [
        pair for name in method_names() for _, part in parts(method_class(name).Settings) for pair in config_keys(part)
    ]


def test_every_setting_has_its_key_and_default():
    cfg = get_cfg()
    add_kg_config(cfg)
    assert len(every_key()) > 30
    for key, field in every_key():
        value = cfg
        for name in key.split("."):
            value = value[name]
        expected = list(field.default) if isinstance(field.default, tuple) else field.default
        assert value == expected and type(value) is type(expected), key


@pytest.mark.parametrize("name", method_names())
def test_defaults_of_the_config_are_those_of_the_settings(name):
    cfg = get_cfg()
    add_kg_config(cfg)
    assert settings_of(cfg, method_class(name).Settings) == method_class(name).Settings()


def test_a_config_becomes_settings():
    cfg = small_config("MODEL.KEYPOINT_GRAPH.RADIUS", 3.0, "MODEL.KEYPOINT_GRAPH.SMOOTH_SIGMA", 2.0)
    settings = method_settings(cfg)
    assert settings == keypoint_graph_settings(
        **{name: value for name, value in TINY.items() if name != "trunk_kernel"}
    )
    assert settings.trunk.widths == (4, 6, 8, 8) and isinstance(settings.trunk.widths, tuple)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["MODEL.CELLS.MASK_MARGIN", 2.0], "mask_margin: 2.0 pixels need training with box_jitter, which is 0"),
        (["MODEL.CELLS.OVERLAP_SIGMA", 0.1], "overlap_sigma: 0.1 .* needs an nms_threshold above 0.5"),
        (["MODEL.CELLS.BOX_JITTER", 0.5], "box_jitter: expected a fraction from 0 to below 0.5, got 0.5"),
        (["MODEL.KEYPOINT_GRAPH.RADIUS", 0.0], "radius: expected pixels above 0, got 0.0"),
        (["INPUT.RESIZE", "crop"], "resize: expected one of isotropic, squeeze, got 'crop'"),
    ],
)
def test_values_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build_model(small_config(*changes))
