"""The confidence of masks: what the head sees, what it is fitted to, and what comes of it."""

import numpy as np
import pytest
import torch
from builders import drawn_image, nuclei_example, tiny_network

from kg_detectron.inference import load_model, predict, save_model
from kg_detectron.modeling import ClassSettings, KeypointGraphNet, SegmentationBranch, SegmentationSettings
from kg_detectron.modeling.confidence import ConfidenceHead, best_ious, worth
from kg_detectron.modeling.cornernet.settings import CornerNetSettings
from kg_detectron.training.run import starting_model

CONFIDENT = {"confidence": "mask", "vote_exponent": 0.1}


def randomised(head: ConfidenceHead) -> ConfidenceHead:
    """With weights and statistics as a fit may give."""
    for name, value in head.state_dict().items():
        if name in ("mean", "deviation"):
            torch.nn.init.uniform_(value, 0.5, 2.0)
        else:
            torch.nn.init.normal_(value, std=0.2)
    return head


def confident_network(**changes) -> KeypointGraphNet:
    model = tiny_network(**CONFIDENT | changes).eval()
    randomised(model.segmentation.confidence_head)
    return model


def test_without_a_head_nothing_is_added():
    plain, confident = tiny_network().eval(), confident_network()
    added = confident.state_dict().keys() - plain.state_dict().keys()
    assert added and all(confident.of_confidence(name) for name in added)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, confident.state_dict()[name])
    image = drawn_image(64, 96)
    with torch.no_grad():
        batch, size = confident.batch_of(confident.network_image(image)[0])
        maps, crop_maps = confident.maps(batch)
        boxes, _ = confident.boxes(maps, [size])
        (of_plain,) = plain.segmentation.predict_cells(crop_maps, boxes, [size])
        (of_confident,) = confident.segmentation.predict_cells(crop_maps, boxes, [size])
    assert (of_plain.confidence == 1).all() and len(set(of_confident.confidence.tolist())) > 5
    assert all(map(torch.equal, of_plain.masks.crops, of_confident.masks.crops))


@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize(("confidence", "sees"), [("mask", slice(6, 12)), ("context", slice(0, 20))])
def test_it_sees_what_one_crop_at_a_time_shows(confidence, sees, classes):
    """Of 6 + 6 features of the branch, and 8 + 7 of the deeper maps; the same beside a class head, which sees all."""
    torch.manual_seed(0)
    known = ClassSettings(names=("one", "two")[:classes])
    branch = SegmentationBranch((6, 8, 7), (6, 8), SegmentationSettings(confidence=confidence), known).eval()
    torch.nn.init.normal_(branch.predict.weight)
    maps = [torch.randn(2, channels, 40 // 2**i, 48 // 2**i) for i, channels in enumerate((6, 8, 7))]
    boxes = [torch.tensor([[0.0, 0, 48, 40], [3, 4, 4, 5], [5, 5, 20, 11]]), torch.tensor([[7.0, 2, 30, 33]])]
    head = randomised(branch.confidence_head)
    expected = []
    for n, some in enumerate(boxes):
        for box in some:
            features = branch.crop_mean([level[n] for level in maps], box)[sees]
            x1, y1, x2, y2 = box.long().tolist()
            sides = torch.tensor(sorted([y2 - y1, x2 - x1]), dtype=torch.float32).log()
            inputs = torch.cat((features, sides))
            expected.append(head.layers((inputs - head.mean) / head.deviation)[0])
    found = branch.crops(maps, boxes).confidence_logits
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-5)
    assert branch.crops(maps, [torch.zeros(0, 4)] * 2).confidence_logits.shape == (0,)


def test_of_one_map_it_sees_the_branch_s_own_features():
    branch = SegmentationBranch((8,), (6,), SegmentationSettings(cut_from="s1", confidence="context")).eval()
    assert len(branch.confidence_head.mean) == 6 + 6 + 2
    assert branch.crops([torch.randn(1, 8, 20, 20)], [torch.tensor([[0.0, 0, 9, 9]])]).confidence_logits.shape == (1,)


def test_until_it_is_fitted_all_masks_are_alike():
    cells = predict(tiny_network(**CONFIDENT).eval(), drawn_image(64, 96))
    plain = predict(tiny_network(vote_exponent=0.1).eval(), drawn_image(64, 96))
    assert len(cells) > 5 and torch.equal(cells.boxes, plain.boxes)


def test_scores_are_votes_to_a_power_times_confidence():
    model = confident_network()
    image = drawn_image(64, 96)
    with torch.no_grad():
        batch, size = model.batch_of(model.network_image(image)[0])
        maps, crop_maps = model.maps(batch)
        (boxes,), (raw,) = model.boxes(maps, [size])
        (segmented,) = model.segmentation.predict_cells(crop_maps, [boxes], [size])
        cells = model.finish(boxes, raw, segmented)
    expected = (raw**0.1 * segmented.confidence).sort(descending=True).values
    torch.testing.assert_close(cells.scores, expected)


@pytest.mark.parametrize(("vote_exponent", "rounding"), [(0.1, 0.0), (4.0, 1e-6)])
def test_what_cannot_reach_a_score_is_left_out_before_segmentation(monkeypatch, vote_exponent, rounding):
    """The cells above a score are the same whether the others were segmented or not.

    Where votes count little, all cells may reach it, and nothing changes; where they decide, some are left out, and the
    last digits of the confidence may depend on which crops go through the head together.
    """
    model = confident_network(vote_exponent=vote_exponent, overlap_sigma=0.1, nms_threshold=0.7)
    last = model.segmentation.confidence_head.layers[-1]
    torch.nn.init.normal_(last.weight, std=0.01)
    torch.nn.init.constant_(last.bias, 4.0)  # near 1
    image = drawn_image(64, 96)
    everything = predict(model, image)
    limit = float(everything.scores[len(everything) // 2])
    segmented = []
    segment = model.segmentation.predict_cells
    monkeypatch.setattr(
        model.segmentation, "predict_cells", lambda m, b, s: segmented.append(sum(map(len, b))) or segment(m, b, s)
    )
    some = predict(model, image, min_score=limit * (1 - rounding))
    expected = everything.above(limit)
    assert len(expected) > 5 and torch.equal(some.boxes, expected.boxes)
    torch.testing.assert_close(some.scores, expected.scores, rtol=rounding, atol=0)
    assert len(expected) <= segmented[0] <= len(everything)
    assert (segmented[0] < len(everything)) == (vote_exponent > 1)


def test_tiles_give_the_confidence_of_the_whole_image():
    model = confident_network(resize="isotropic", norm="FrozenBN")
    pixels = drawn_image(96, 128)
    whole = predict(model, pixels, scale=1.0, tile=128)
    tiled = predict(model, pixels, scale=1.0, tile=64, overlap=64)
    scores = {tuple(box): score for box, score in zip(whole.boxes.round().tolist(), whole.scores.tolist(), strict=True)}
    pairs = [
        (scores[tuple(box)], score)
        for box, score in zip(tiled.boxes.round().tolist(), tiled.scores.tolist(), strict=True)
        if tuple(box) in scores
    ]
    assert len(pairs) > 0.95 * len(whole) > 10
    np.testing.assert_allclose(*np.array(pairs).T, rtol=1e-3)


def test_a_model_file_keeps_the_head(tmp_path):
    model = confident_network()
    save_model(model, tmp_path / "m.safetensors")
    loaded = load_model(tmp_path / "m.safetensors")
    pixels = drawn_image(64, 96)
    torch.testing.assert_close(predict(loaded, pixels).scores, predict(model, pixels).scores)


def test_a_trained_model_may_get_a_head_and_lose_it(tmp_path):
    plain = tiny_network().eval()
    save_model(plain, tmp_path / "plain.safetensors")
    changes = {"segmentation": {"confidence": "mask"}, "ranking": {"vote_exponent": 0.1}}
    confident = starting_model(str(tmp_path / "plain.safetensors"), changes=changes)
    assert confident.segmentation.confidence_head is not None
    for name, value in plain.state_dict().items():
        assert torch.equal(value, confident.state_dict()[name])
    confident.segmentation.confidence_head.mean.fill_(3)
    save_model(confident.eval(), tmp_path / "confident.safetensors")
    again = starting_model(str(tmp_path / "confident.safetensors"), changes={"ranking": {"vote_exponent": 0.5}})
    assert (again.segmentation.confidence_head.mean == 3).all()
    without = starting_model(str(tmp_path / "confident.safetensors"), changes={"segmentation": {"confidence": ""}})
    assert without.state_dict().keys() == plain.state_dict().keys()


def test_cornernet_has_no_such_head():
    with pytest.raises(ValueError, match="confidence: expected none, for CornerNet has scores of its own"):
        CornerNetSettings(segmentation=SegmentationSettings(confidence="mask"))


def test_best_ious_are_those_of_plain_loops():
    rng = np.random.default_rng(0)
    for count, (height, width), cells in ((5, (20, 30), 4), (0, (10, 10), 2), (3, (16, 16), 0), (4, (24, 18), 6)):
        owner = rng.integers(0, cells + 1, (height, width))
        masks = np.array([owner == n + 1 for n in range(cells)]).reshape(cells, height, width)
        windows, inside, expected = [], [torch.zeros(0, dtype=torch.bool)], []
        for _ in range(count):
            x1, x2 = sorted(rng.choice(width + 1, 2, replace=False).tolist())
            y1, y2 = sorted(rng.choice(height + 1, 2, replace=False).tolist())
            predicted = np.zeros((height, width), bool)
            predicted[y1:y2, x1:x2] = rng.random((y2 - y1, x2 - x1)) < 0.6
            windows.append([x1, y1, x2, y2])
            inside.append(torch.from_numpy(predicted[y1:y2, x1:x2].flatten()))
            overlaps = [(predicted & mask).sum() / (predicted | mask).sum() for mask in masks]
            expected.append(max(overlaps, default=0.0))
        found = best_ious(torch.cat(inside), torch.tensor(windows).reshape(-1, 4), torch.from_numpy(owner))
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
        assert max(expected, default=1) > 0.1 or not cells


def test_masks_are_worth_more_the_better_they_fit():
    values = worth(torch.tensor([0.0, 0.4, 0.5, 0.7, 0.8, 1.0]))
    torch.testing.assert_close(values, torch.tensor([0.0, 0, 0.25, 0.75, 1, 1]))


def test_training_leaves_it_as_it_is():
    model = confident_network().train()
    before = {name: value.clone() for name, value in model.state_dict().items() if model.of_confidence(name)}
    image, target = nuclei_example(np.random.default_rng(0), side=64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = model([image], [target])
    assert "loss_mask" in losses and not any("confidence" in name for name in losses)
    sum(losses.values()).backward()
    optimizer.step()
    assert len(before) > 2 and all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
