"""The whole network: size, shapes, calling convention, initial weights, losses."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from builders import ROOT, TINY, box_example, keypoint_graph_settings, tiny_network
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import ResNet18_Weights, ResNet34_Weights, resnet18, resnet34

from kg_detectron.graph import DIRECTED_EDGES
from kg_detectron.modeling import (
    KeypointGraphNet,
    KeypointMaps,
    ResNetC4,
    TargetSettings,
    keypoint_losses,
    keypoint_targets,
)


def test_papers_network_has_the_papers_size():
    """679 GMAC of the dense part at 512x512 and 73.9 M parameters, counted on the meta device."""
    with torch.device("meta"):
        model = KeypointGraphNet.build()
        with FlopCounterMode(display=False) as counter:
            model.keypoint_branch(model.backbone(torch.empty(1, 3, 512, 512)))
    assert round(counter.get_total_flops() / 2e9) == 679
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 73.9


def lite(**changes) -> KeypointGraphNet:
    """The network of configs/parts/method/kg_lite.yaml."""
    values = {"backbone": "resnet18", "trunk": "lite", "heads": "lite", "c0_channels": 16, "scales": (2, 3, 4)}
    values |= {"widths": (16, 48, 64, 96)}
    return KeypointGraphNet.build(keypoint_graph_settings(**values | changes))


def test_lite_network_stays_within_its_budget():
    """DESIGN.md section 8: at most 60 GMAC, with 300 cells of 32 x 32 pixels, and 15 M parameters at 512x512."""
    model = lite().eval()
    corners = torch.rand(300, 2) * 480
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        features = model.backbone(torch.zeros(1, 3, 512, 512))
        model.keypoint_branch(features)
        model.segmentation(features, [torch.cat((corners, corners + 32), dim=1)])
    assert counter.get_total_flops() / 2e9 < 60
    assert sum(p.numel() for p in model.parameters()) / 1e6 < 15


def test_lite_branch_is_shift_equivariant():
    """Moving the image by the largest stride moves all maps: what tiles of large images rely on."""
    torch.manual_seed(0)
    model = lite().eval()
    for parameter in model.keypoint_branch.parameters():  # its blocks start as identities
        torch.nn.init.normal_(parameter, std=0.1)
    image = torch.zeros(1, 3, 192, 192)
    image[..., 80:96, 80:96] = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        maps, _ = model.keypoint_branch(model.backbone(image))
        moved, _ = model.keypoint_branch(model.backbone(image.roll((16, 16), (2, 3))))
    for one, other in zip(maps, moved, strict=True):
        shift, middle = 16 // one.stride, slice(80 // one.stride, 112 // one.stride)
        for before, after in zip(one[:3], other[:3], strict=True):
            torch.testing.assert_close(
                after.roll((-shift, -shift), (2, 3))[..., middle, middle], before[..., middle, middle]
            )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trunk": "tiny"}, "trunk: expected one of paper, lite, got 'tiny'"),
        ({"heads": "tiny"}, "heads: expected one of paper, lite, got 'tiny'"),
        ({"cut_from": "s1", "scales": (2, 3)}, "'s1' needs scale 1, and the lowest scale is 2"),
    ],
)
def test_unknown_parts_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_network(**changes)


@pytest.mark.parametrize("size", [(33, 47), (64, 64), (1, 1), (100, 17)])
def test_shapes_at_all_scales(size):
    model = tiny_network()
    batch = model.preprocessing.batch([torch.zeros(3, *size), torch.zeros(3, 16, 16)], model.divisor)
    height, width = batch.shape[2:]
    assert height % 16 == width % 16 == 0 and height - 15 <= max(size[0], 16) <= height
    features = model.backbone(batch)
    assert [tuple(f.shape[1:]) for f in features] == [
        (c, height // s, width // s) for c, s in zip((4, 64, 64, 128, 256), (1, 2, 4, 8, 16), strict=True)
    ]
    maps, decoded = model.keypoint_branch(features)
    for scale, decoder_map, channels, stride in zip(
        maps, reversed(decoded.values()), TINY["widths"], (1, 2, 4, 8), strict=True
    ):
        assert decoder_map.shape == (2, channels, height // stride, width // stride)
        assert scale.stride == stride
        for tensor, channels in zip(scale[:3], (5, 10, 40), strict=True):
            assert tensor.shape == (2, channels, height // stride, width // stride)


@pytest.mark.parametrize("depth", [18, 34, 50])
@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "GN"])
def test_depths_and_norms(depth, norm):
    backbone = ResNetC4(depth, norm, c0_channels=4)
    shapes = [f.shape[1] for f in backbone(torch.zeros(1, 3, 32, 32))]
    assert tuple(shapes) == backbone.channels == ((4, 64, 256, 512, 1024) if depth == 50 else (4, 64, 64, 128, 256))


@pytest.mark.parametrize("kind", ["paper", "lite"])
@pytest.mark.parametrize(
    ("cut_from", "scales"),
    [("features", (1, 2, 3, 4)), ("features", (1,)), ("features", (2, 4)), ("s1", (1, 2, 3, 4)), ("s1", (1,))],
)
def test_training_and_evaluation(kind, cut_from, scales):
    """Images of different sizes, one without cells: finite losses, a gradient for every parameter, cells."""
    model = tiny_network(trunk=kind, heads=kind, cut_from=cut_from, scales=scales)
    examples = [box_example(70, 90, [[3, 4, 40, 50], [42, 5, 60, 30]]), box_example(101, 64, [])]
    losses = model(*map(list, zip(*examples, strict=True)))
    assert set(losses) == {"loss_heatmap", "loss_single_offset", "loss_group_offset", "loss_mask"}
    assert all(torch.isfinite(v) and v >= 0 for v in losses.values())
    sum(losses.values()).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]

    results = model.eval().detect([image for image, _ in examples])
    for result, (image, _) in zip(results, examples, strict=True):
        count = len(result["scores"])
        assert result["boxes"].shape == (count, 4) and len(result["masks"]) == count
        assert (result["labels"] == 1).all() and (result["scores"].diff() <= 0).all()
        assert result["masks"].size == tuple(image.shape[1:])
        assert (result["boxes"] >= 0).all() and (result["boxes"].amax(0)[2:] <= torch.tensor(image.shape[:0:-1])).all()
    assert any(len(r["scores"]) for r in results), "the threshold of 0 should let something through"


def test_a_batch_without_any_cell_trains():
    model = tiny_network()
    losses = model(*map(list, zip(box_example(40, 40, []), box_example(40, 40, []), strict=True)))
    assert losses["loss_single_offset"] == losses["loss_group_offset"] == losses["loss_mask"] == 0
    assert torch.isfinite(losses["loss_heatmap"])


def test_losses_are_those_of_the_paper():
    """Per scale BCE over all pixels, L1 / r over disc pixels only; 0.25 on the group offsets; by plain loops."""
    torch.manual_seed(0)
    boxes = [torch.tensor([[2.0, 3, 22, 21]])]
    maps = [KeypointMaps(torch.randn(1, 5, 32, 32), torch.randn(1, 10, 32, 32), torch.randn(1, 40, 32, 32), 1)]
    heatmap, single, group = keypoint_targets(boxes, (32, 32), 1, 4.0)
    p = maps[0].heatmap.double().sigmoid()
    expected = -(heatmap * p.log() + (1 - heatmap) * (1 - p).log()).mean()
    errors = {"single": [], "group": []}
    for y in range(32):
        for x in range(32):
            for k in range(5):
                if heatmap[0, k, y, x]:
                    c = slice(2 * k, 2 * k + 2)
                    errors["single"] += (maps[0].single_offset[0, c, y, x] - single[0, c, y, x]).abs().tolist()
            for e, (k, _) in enumerate(DIRECTED_EDGES):
                if heatmap[0, k, y, x]:
                    c = slice(2 * e, 2 * e + 2)
                    errors["group"] += (maps[0].group_offset[0, c, y, x] - group[0, c, y, x]).abs().tolist()
    mean = {name: sum(values) / len(values) / 4.0 for name, values in errors.items()}
    losses = keypoint_losses(maps, boxes, (32, 32), TargetSettings(radius=4.0))
    assert float(losses["loss_heatmap"]) == pytest.approx(float(expected), rel=1e-5)
    assert float(losses["loss_single_offset"]) == pytest.approx(mean["single"], rel=1e-5)
    assert float(losses["loss_group_offset"]) == pytest.approx(0.25 * mean["group"], rel=1e-5)


def test_evaluation_does_not_depend_on_the_batch():
    model = tiny_network().eval()
    images = [torch.rand(3, 48, 64) * 255, torch.rand(3, 48, 64) * 255]
    together = model.detect(images)
    for image, result in zip(images, together, strict=True):
        (alone,) = model.detect([image])
        assert len(alone) > 0
        torch.testing.assert_close(alone["boxes"], result["boxes"])
        assert alone["masks"].rle() == result["masks"].rle()


@pytest.mark.parametrize(("depth", "build"), [(18, resnet18), (34, resnet34)])
def test_imagenet_weights_load_by_name(depth, build, tmp_path, monkeypatch):
    """Through torchvision's weight enum, from a file that the test puts where torchvision caches its downloads."""
    torch.manual_seed(depth)
    donor = build()
    weights = {18: ResNet18_Weights, 34: ResNet34_Weights}[depth].IMAGENET1K_V1
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(donor.state_dict(), folder / weights.url.split("/")[-1])

    backbone = ResNetC4(depth, weights="IMAGENET1K_V1").eval()
    donor.eval()
    image = torch.rand(1, 3, 64, 64)
    stem = donor.relu(donor.bn1(donor.conv1(image)))
    c2 = donor.layer1(donor.maxpool(stem))
    expected = [stem, c2, donor.layer2(c2), donor.layer3(donor.layer2(c2))]
    for feature, other in zip(backbone(image)[1:], expected, strict=True):
        torch.testing.assert_close(feature, other)


def test_arguments_that_do_not_fit_are_named():
    for changes, named in (
        ({"backbone": "resnet101"}, "backbone"),
        ({"norm": "LN"}, "norm"),
        ({"backbone_weights": "IMAGENET"}, "weights"),
        ({"head_kernel": 4}, "head_kernel"),
        ({"trunk_kernel": 4}, "trunk_kernel"),
        ({"scales": (0, 1)}, "scales"),
        ({"widths": (4, 4)}, "widths"),
        ({"cut_from": "s2"}, "cut_from"),
    ):
        with pytest.raises(ValueError, match=named):
            tiny_network(**changes)
    model = tiny_network()
    image, target = box_example(40, 40, [[3, 4, 30, 30]])
    with pytest.raises(ValueError, match="targets"):
        model([image])
    with pytest.raises(ValueError, match=r"images\[0\]"):
        model([image[:2]], [target])
    with pytest.raises(ValueError, match="images"):
        model([], [])
    with pytest.raises(ValueError, match=r"targets\[0\]\['masks'\]"):
        model([image], [{"boxes": target["boxes"], "masks": target["masks"][:, :20]}])


def test_a_training_step_runs_in_mixed_precision():
    """As Detectron2's SOLVER.AMP does it: autocast round the forward pass. Losses are float32, and about the same."""
    images, targets = zip(box_example(64, 96, [[4, 5, 40, 50], [50, 10, 58, 12]]), box_example(60, 80, []), strict=True)
    model = tiny_network()
    expected = model(list(images), list(targets))
    for pixels in (2**19, 300):  # one chunk of crops, and several
        model = tiny_network(chunk_pixels=pixels)
        with torch.autocast("cpu", torch.bfloat16):
            losses = model(list(images), list(targets))
        for name, loss in losses.items():
            assert loss.dtype == torch.float32
            torch.testing.assert_close(loss, expected[name], rtol=0.02, atol=0.01)
        sum(losses.values()).backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("missing_factor", [0.0, 0.5])
def test_evaluation_in_half_precision_decodes_in_float32(precision, channels_last, missing_factor, monkeypatch):
    model, image = tiny_network(missing_factor=missing_factor).eval(), box_example(64, 96, [])[0]
    seen = []
    decode = type(model.decoder).forward

    def forward(decoder, maps, sizes):
        seen.append((torch.is_autocast_enabled("cpu"), {m.heatmap.dtype for m in maps}))
        return decode(decoder, maps, sizes)

    monkeypatch.setattr(type(model.decoder), "forward", forward)
    with torch.no_grad():
        model.detect([image])
        cells = model.accelerate(precision, channels_last).detect([image])[0]
    assert seen == [(False, {torch.float32}), (False, {getattr(torch, precision)})]
    assert cells.boxes.dtype == cells.scores.dtype == torch.float32 and len(cells) > 0
    assert all(crop.dtype == torch.float32 for crop in cells.masks.crops)
    assert model.backbone.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    with pytest.raises(ValueError, match="precision: expected one of float32, bfloat16, float16, got 'half'"):
        model.accelerate("half")


def test_half_precision_changes_the_maps_little():
    model = tiny_network().eval()
    image = torch.rand(1, 3, 64, 96) - 0.5
    with torch.no_grad():
        exact, _ = model.keypoint_branch(model.backbone(image))
        with torch.autocast("cpu", torch.bfloat16):
            half, _ = model.keypoint_branch(model.backbone(image))
    for scale, other in zip(exact, half, strict=True):
        for a, b in zip(scale[:3], other[:3], strict=True):
            assert (a - b).abs().max() < 0.05 * a.abs().max()


def test_missing_weights_are_an_error():
    with pytest.raises(RuntimeError, match="conv1.weight"):
        ResNetC4(18).load_resnet_weights({k: v for k, v in resnet18().state_dict().items() if k != "conv1.weight"})


def test_predicts_with_detectron2_blocked(tmp_path):
    program = """
        import sys
        sys.modules["detectron2"] = None
        import numpy as np
        from kg_detectron.inference import load_model, predict, save_model
        from builders import tiny_network
        save_model(tiny_network(), sys.argv[1])
        image = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
        cells = predict(load_model(sys.argv[1]), image)
        assert len(cells.boxes) == len(cells.masks.rle()) > 0
        assert cells.size == (50, 70)
        print("predicted", len(cells))
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "model.pth")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "predicted" in done.stdout, done.stderr
