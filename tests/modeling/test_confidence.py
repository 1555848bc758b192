"""The confidence of masks: its targets and loss by plain loops, what it learns from, and what comes of it."""

import numpy as np
import pytest
import torch
from builders import drawn_image, nuclei_example, tiny_network
from torch.nn.functional import binary_cross_entropy_with_logits

from kg_detectron.inference import load_model, predict, save_model
from kg_detectron.modeling import SegmentationBranch, SegmentationSettings
from kg_detectron.modeling.confidence import ConfidenceHead, best_ious, worth
from kg_detectron.modeling.cornernet.settings import CornerNetSettings
from kg_detectron.training.run import starting_model

CONFIDENT = {"confidence_candidates": 20, "vote_exponent": 0.1}


def test_without_a_head_nothing_is_added():
    plain, confident = tiny_network().eval(), tiny_network(confidence_candidates=20).eval()
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


def test_it_sees_what_one_crop_at_a_time_shows():
    torch.manual_seed(0)
    branch = SegmentationBranch((6, 8, 8), (6, 8), SegmentationSettings(confidence_candidates=9)).eval()
    torch.nn.init.normal_(branch.predict.weight)
    maps = [torch.randn(2, channels, 40 // 2**i, 48 // 2**i) for i, channels in enumerate((6, 8, 8))]
    boxes = [torch.tensor([[0.0, 0, 48, 40], [3, 4, 4, 5], [5, 5, 20, 11]]), torch.tensor([[7.0, 2, 30, 33]])]
    head, running = branch.confidence_head, branch.confidence_head.standardised
    expected = []
    for n, some in enumerate(boxes):
        for box in some:
            features = branch.crop_mean([level[n] for level in maps], box)
            x1, y1, x2, y2 = box.long().tolist()
            sides = torch.tensor(sorted([y2 - y1, x2 - x1]), dtype=torch.float32).log()
            inputs = torch.cat((features, sides))
            expected.append(head.layers((inputs - running.running_mean) / (running.running_var + 1e-6).sqrt())[0])
    found = branch.crops(maps, boxes).confidence_logits
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-5)
    assert branch.crops(maps, [torch.zeros(0, 4)] * 2).confidence_logits.shape == (0,)


def test_running_statistics_are_those_of_plain_formulas():
    torch.manual_seed(0)
    head = ConfidenceHead(3)
    batches = [(torch.randn(n, 3) * 5 + 2, torch.randint(1, 90, (n, 2))) for n in (7, 0, 4)]
    mean, variance, seen = np.zeros(5), np.ones(5), 0
    for features, sizes in batches:
        head(features, sizes)
        if len(features):
            rows = np.hstack((features.numpy(), np.log(np.sort(sizes.numpy(), axis=1))))
            seen += 1
            mean = mean + (rows.mean(0) - mean) / seen
            variance = variance + (rows.var(0) - variance) / seen
    np.testing.assert_allclose(head.standardised.running_mean.numpy(), mean, rtol=1e-5)
    np.testing.assert_allclose(head.standardised.running_var.numpy(), variance, rtol=1e-4)
    before = head.standardised.running_mean.clone()
    head.eval()(torch.randn(6, 3), torch.ones(6, 2))
    assert torch.equal(head.standardised.running_mean, before)


def test_best_ious_are_those_of_plain_loops():
    rng = np.random.default_rng(0)
    counts, sizes = (5, 0, 3, 4), ((20, 30), (10, 10), (16, 16), (24, 18))
    masks, windows, inside, expected = [], [], [], []
    for count, (height, width), cells in zip(counts, sizes, (4, 2, 0, 6), strict=True):
        owner = rng.integers(0, cells + 1, (height, width))
        masks.append(torch.from_numpy(np.array([owner == n + 1 for n in range(cells)]).reshape(cells, height, width)))
        for _ in range(count):
            x1, x2 = sorted(rng.choice(width + 1, 2, replace=False).tolist())
            y1, y2 = sorted(rng.choice(height + 1, 2, replace=False).tolist())
            predicted = np.zeros((height, width), bool)
            predicted[y1:y2, x1:x2] = rng.random((y2 - y1, x2 - x1)) < 0.6
            windows.append([x1, y1, x2, y2])
            inside.append(torch.from_numpy(predicted[y1:y2, x1:x2].flatten()))
            overlaps = [(predicted & mask).sum() / (predicted | mask).sum() for mask in masks[-1].numpy()]
            expected.append(max(overlaps, default=0.0))
    found = best_ious(torch.cat(inside), torch.tensor(windows), counts, masks)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    assert max(expected) > 0.1


def test_the_loss_is_that_of_plain_loops():
    ious = torch.tensor([0.0, 0.4, 0.5, 0.7, 0.8, 1.0])
    values = worth(ious)
    torch.testing.assert_close(values, torch.tensor([0.0, 0, 0.25, 0.75, 1, 1]))
    logits = torch.randn(6)
    total = sum(binary_cross_entropy_with_logits(x, y) for x, y in zip(logits, values, strict=True))
    torch.testing.assert_close(ConfidenceHead(2).loss(logits, ious), total / 6)
    assert ConfidenceHead(2).loss(torch.zeros(0), torch.zeros(0)) == 0


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_only_the_head_learns_from_its_loss(threshold):
    """Also where nothing is found (above a threshold of 1): then the loss is 0, and all its weights take part."""
    model = tiny_network(**CONFIDENT, peak_threshold=threshold)
    image, target = nuclei_example(np.random.default_rng(0), side=64)
    loss = model([image], [target])["loss_confidence"]
    assert (loss > 0) == (threshold == 0)
    loss.backward()
    learns = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learns == {name for name, _ in model.named_parameters() if model.of_confidence(name)}


def test_candidates_are_drawn_up_to_the_number_given(monkeypatch):
    model = tiny_network(**CONFIDENT | {"confidence_candidates": 3})
    image, target = nuclei_example(np.random.default_rng(0), side=64)
    counts = []
    loss = ConfidenceHead.loss
    monkeypatch.setattr(
        ConfidenceHead, "loss", lambda self, logits, ious: counts.append(len(ious)) or loss(self, logits, ious)
    )
    model([image, image], [target, target])
    assert counts == [6]


def test_scores_are_votes_to_a_power_times_confidence():
    model = tiny_network(**CONFIDENT).eval()
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
    model = tiny_network(**CONFIDENT | {"vote_exponent": vote_exponent}, overlap_sigma=0.1, nms_threshold=0.7).eval()
    torch.nn.init.constant_(model.segmentation.confidence_head.layers[-1].bias, 4.0)  # near 1
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
    model = tiny_network(**CONFIDENT, resize="isotropic", norm="FrozenBN").eval()
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
    model = tiny_network(**CONFIDENT)
    image, target = nuclei_example(np.random.default_rng(0), side=64)
    model([image], [target])  # takes in statistics
    model.eval()
    save_model(model, tmp_path / "m.safetensors")
    loaded = load_model(tmp_path / "m.safetensors")
    pixels = drawn_image(64, 96)
    torch.testing.assert_close(predict(loaded, pixels).scores, predict(model, pixels).scores)


def test_a_trained_model_may_get_a_head_and_lose_it(tmp_path):
    plain = tiny_network().eval()
    save_model(plain, tmp_path / "plain.safetensors")
    changes = {"segmentation": {"confidence_candidates": 20}, "ranking": {"vote_exponent": 0.1}}
    confident = starting_model(str(tmp_path / "plain.safetensors"), changes=changes)
    assert confident.segmentation.confidence_head is not None
    for name, value in plain.state_dict().items():
        assert torch.equal(value, confident.state_dict()[name])
    confident.segmentation.confidence_head.standardised.running_mean.fill_(3)
    save_model(confident.eval(), tmp_path / "confident.safetensors")
    again = starting_model(str(tmp_path / "confident.safetensors"), changes={"ranking": {"vote_exponent": 0.5}})
    assert (again.segmentation.confidence_head.standardised.running_mean == 3).all()
    without = starting_model(
        str(tmp_path / "confident.safetensors"), changes={"segmentation": {"confidence_candidates": 0}}
    )
    assert without.state_dict().keys() == plain.state_dict().keys()


def test_cornernet_has_no_such_head():
    with pytest.raises(ValueError, match="confidence_candidates: expected 0, for CornerNet has scores of its own"):
        CornerNetSettings(segmentation=SegmentationSettings(confidence_candidates=5))


def test_it_learns_which_masks_are_cells():
    """Boxes on cells, which look otherwise than what is beside them, come to be above boxes there."""
    torch.manual_seed(0)
    branch = SegmentationBranch((6, 8, 8), (6, 8), SegmentationSettings(confidence_candidates=8))
    maps = [torch.randn(1, channels, 40 // 2**i, 48 // 2**i) for i, channels in enumerate((6, 8, 8))]
    boxes = torch.tensor([[2.0, 4, 12, 18], [26, 4, 42, 16], [4, 24, 20, 38], [28, 22, 46, 36]])
    masks = torch.zeros(4, 40, 48, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = True
        for level, values in enumerate(maps):
            values[..., y1 // 2**level : y2 // 2**level, x1 // 2**level : x2 // 2**level] += 2
    beside = torch.tensor([[14.0, 6, 24, 16], [20, 18, 28, 34], [13, 0, 25, 12], [21, 26, 27, 40]])
    candidates = torch.cat((boxes, beside))
    optimizer = torch.optim.Adam(branch.parameters(), 0.02)
    for _ in range(40):
        losses = branch.losses(maps, [boxes], [masks], candidates=[candidates])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    ((_, _, confidence),) = branch.eval().predict_cells(maps, [candidates], [(40, 48)])
    assert confidence[:4].min() > 0.8 and confidence[4:].max() < 0.2
