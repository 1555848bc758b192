"""Settings of the parts: plain and back, unknown names, keys of the config, combinations that make no sense."""

import dataclasses
import json
import math

import pytest
from builders import TINY, keypoint_graph_settings, tiny_network

from kg_detectron.modeling import (
    BackboneSettings,
    DecodingSettings,
    HeadSettings,
    KeypointGraphSettings,
    Preprocessing,
    RankingSettings,
    Scores,
    SegmentationSettings,
    TargetSettings,
    TrunkSettings,
    method_class,
    method_names,
)
from kg_detectron.modeling.instance_net import InstanceNet
from kg_detectron.modeling.methods import register_method
from kg_detectron.modeling.settings import config_keys, from_plain, parts, to_plain

CHANGED = keypoint_graph_settings(
    **TINY, min_side=3.0, pixel_size=0.5, diameters=(3.0, 5.0, 9.0, 12.0, 20.0), overlap_sigma=0.1, nms_threshold=0.7
)


@pytest.mark.parametrize("settings", [method_class(name).Settings() for name in method_names()] + [CHANGED])
def test_settings_survive_json(settings):
    plain = to_plain(settings)
    assert from_plain(type(settings), json.loads(json.dumps(plain))) == settings
    assert plain.keys() == {name for name, _ in parts(type(settings))}


def test_what_is_missing_keeps_its_default():
    settings = from_plain(KeypointGraphSettings, {"targets": {"radius": 2.0}})
    assert settings == KeypointGraphSettings(targets=TargetSettings(radius=2.0))


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"colour": {}}, "KeypointGraphSettings: unknown settings colour"),
        ({"targets": {"radius": 2.0, "colour": 1, "age": 2}}, "TargetSettings: unknown settings age, colour"),
        ({"targets": 3}, "TargetSettings: expected a mapping of settings, got 3"),
        ({"targets": {"radius": -1.0}}, "radius: expected pixels above 0, got -1.0"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(plain, message):
    with pytest.raises(ValueError, match=message):
        from_plain(KeypointGraphSettings, plain)


def test_every_setting_has_one_key():
    """No two settings of a method share a key, so that a config can tell them apart."""
    for name in method_names():
        keys = [key for _, part in parts(method_class(name).Settings) for key, _ in config_keys(part)]
        assert len(keys) == len(set(keys)) > 0


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        (Preprocessing, {"normalisation": "none"}, "normalisation.*'none'"),
        (Preprocessing, {"percentiles": (50.0, 10.0)}, "percentiles"),
        (Preprocessing, {"resize": "crop"}, "resize: expected one of isotropic, squeeze, got 'crop'"),
        (Preprocessing, {"size": (0, 5)}, "size"),
        (Preprocessing, {"diameter": 0.0}, "diameter"),
        (Preprocessing, {"pixel_size": -1.0}, "pixel_size"),
        (Preprocessing, {"pixel_std": (1.0, 0.0, 1.0)}, "pixel_std"),
        (Preprocessing, {"pixel_mean": (1.0, 0.0)}, "pixel_mean"),
        (BackboneSettings, {"backbone": "vgg"}, "backbone: expected one of .*resnet18.*, got 'vgg'"),
        (BackboneSettings, {"norm": "LN"}, "norm"),
        (BackboneSettings, {"c0_channels": 0}, "c0_channels"),
        (BackboneSettings, {"backbone_lr_factor": -0.1}, "backbone_lr_factor"),
        (TrunkSettings, {"widths": (1, 2, 3)}, "widths"),
        (TrunkSettings, {"trunk_kernel": 2}, "trunk_kernel"),
        (HeadSettings, {"heads": "big"}, "heads"),
        (HeadSettings, {"scales": (1, 1)}, "scales"),
        (HeadSettings, {"scales": ()}, "scales"),
        (TargetSettings, {"min_side": -1.0}, "min_side"),
        (TargetSettings, {"group_offset_weight": -1.0}, "group_offset_weight"),
        (DecodingSettings, {"smooth_sigma": -1.0}, "smooth_sigma"),
        (DecodingSettings, {"peak_threshold": math.nan}, "peak_threshold"),
        (DecodingSettings, {"hops": 3}, "hops: expected 1 or 2, got 3"),
        (DecodingSettings, {"nms_threshold": 1.5}, "nms_threshold"),
        (SegmentationSettings, {"box_jitter": 0.5}, "box_jitter"),
        (SegmentationSettings, {"confidence": "all"}, "confidence: expected one of '', 'mask', 'context', got 'all'"),
        (SegmentationSettings, {"mask_margin": -1.0}, "mask_margin"),
        (SegmentationSettings, {"mask_margin": math.nan}, "mask_margin"),
        (SegmentationSettings, {"mask_threshold": 1.0}, "mask_threshold"),
        (SegmentationSettings, {"mask_weight": -1.0}, "mask_weight"),
        (SegmentationSettings, {"chunk_pixels": 0}, "chunk_pixels"),
        (RankingSettings, {"blur_weight": -1.0}, "blur_weight"),
        (Scores, {"raw": (0.1, 0.5), "probability": (0.5,)}, "probability"),
        (Scores, {"raw": (0.5,), "probability": (0.5,)}, "raw"),
        (Scores, {"raw": (0.5, 0.1), "probability": (0.1, 0.5)}, "raw"),
        (Scores, {"raw": (0.1, 0.5), "probability": (0.5, 0.5)}, "probability"),
        (Scores, {"raw": (0.1, 1.5), "probability": (0.1, 0.5)}, "raw"),
        (Scores, {"threshold": 1.5}, "threshold"),
    ],
)
def test_values_out_of_range_are_named(part, values, message):
    with pytest.raises(ValueError, match=message):
        part(**values)


def test_combinations_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="mask_margin: 2.0 pixels need training with box_jitter, which is 0"):
        keypoint_graph_settings(mask_margin=2.0)
    keypoint_graph_settings(mask_margin=2.0, box_jitter=0.1)
    with pytest.raises(ValueError, match="overlap_sigma: 0.1 .* needs an nms_threshold above 0.5"):
        keypoint_graph_settings(overlap_sigma=0.1)
    keypoint_graph_settings(overlap_sigma=0.1, nms_threshold=0.6)


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TargetSettings().radius = 3.0


# Methods and what describes a model


def test_a_description_builds_the_same_network():
    model = tiny_network(backbone_weights="")
    description = json.loads(json.dumps(model.description()))
    assert description["method"] == "keypoint_graph"
    assert "backbone_weights" not in description["settings"]["backbone"]
    other = method_class(description["method"]).build(from_plain(KeypointGraphSettings, description["settings"]))
    other.load_state_dict(model.state_dict())
    assert other.settings == model.settings and from_plain(Scores, description["scores"]) == model.scores


def test_preprocessing_is_changed_on_one_model_alone():
    model, other = tiny_network(), tiny_network()
    assert model.with_preprocessing(resize="isotropic", diameter=20.0) is model
    assert model.preprocessing == dataclasses.replace(other.preprocessing, resize="isotropic", diameter=20.0)
    assert model.description()["settings"]["preprocessing"]["diameter"] == 20.0
    assert other.preprocessing.resize == "squeeze"


def test_methods_are_known_by_one_name_each():
    with pytest.raises(ValueError, match="method: expected one of .*keypoint_graph.*, got 'no_such'"):
        method_class("no_such")

    class Other(InstanceNet):
        pass

    with pytest.raises(ValueError, match="'keypoint_graph' is registered already, as KeypointGraphNet"):
        register_method("keypoint_graph")(Other)
    assert method_class("keypoint_graph").__name__ == "KeypointGraphNet"
