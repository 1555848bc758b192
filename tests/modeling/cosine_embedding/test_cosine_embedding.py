"""CosineEmbedding: neighbours and loss against plain loops, clusters, and embeddings that decode to their cells."""

import math

import numpy as np
import pytest
import torch
from builders import nuclei_example
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from kg_detectron.modeling import BackboneSettings, CosineEmbeddingNet, Preprocessing, TrunkSettings
from kg_detectron.modeling.cosine_embedding.clustering import hdbscan, mean_shift
from kg_detectron.modeling.cosine_embedding.decoding import decode_embedding
from kg_detectron.modeling.cosine_embedding.losses import embedding_loss, neighbours
from kg_detectron.modeling.cosine_embedding.settings import (
    ClusteringSettings,
    CosineEmbeddingSettings,
    EmbeddingHeadSettings,
)
from kg_detectron.modeling.label_maps import label_maps


def blocks(seed: int, rows: int = 4, columns: int = 5, side: int = 3, numbers: int = 6) -> torch.Tensor:
    """(rows * side, columns * side) int64 of blocks of random numbers."""
    return torch.from_numpy(
        np.kron(np.random.default_rng(seed).integers(0, numbers, (rows, columns)), np.ones((side, side), int))
    )


@pytest.mark.parametrize("radius", [2.0, 5.0])
def test_neighbours_are_those_of_plain_loops(radius):
    labels = blocks(0)
    numbers, instance = labels.flatten().unique(return_inverse=True)
    found = neighbours(labels, numbers, instance, radius)
    for i, j in np.ndindex(len(numbers), len(numbers)):
        pixels = (labels == numbers[i]).nonzero().float()
        y, x = pixels.mean(0).tolist()
        near = any(math.dist((y, x), p) <= radius for p in (labels == numbers[j]).nonzero().tolist())
        expected = i != j and bool(numbers[j] > 0) and (bool(numbers[i] == 0) or near)
        assert bool(found[i, j]) == expected


@pytest.mark.parametrize("radius", [2.0, 5.0])
def test_the_loss_is_that_of_plain_loops(radius):
    torch.manual_seed(0)
    labels, embedding = blocks(1), torch.randn(4, 12, 15)
    numbers, instance = labels.flatten().unique(return_inverse=True)
    beside = neighbours(labels, numbers, instance, radius)
    total = 0.0
    for i, number in enumerate(numbers):
        own = embedding[:, labels == number]
        mean = own.mean(1)

        def cosine(vector, mean=mean):
            return float(vector @ mean / vector.norm() / mean.norm())

        total += sum(1 - cosine(v) for v in own.T) / own.shape[1]
        others = [v for j in beside[i].nonzero()[:, 0] for v in embedding[:, labels == numbers[j]].T]
        total += 0.7 * sum(cosine(v) ** 2 for v in others) / max(1, len(others))
    loss = embedding_loss(embedding, labels, radius, contrast_weight=0.7)
    assert float(loss) == pytest.approx(total / len(numbers), rel=1e-4)


def test_cells_are_drawn_where_there_are_many():
    torch.manual_seed(0)
    labels, embedding = blocks(2), torch.randn(4, 12, 15)
    draws = {round(float(embedding_loss(embedding, labels, 3.0, max_cells=2)), 6) for _ in range(20)}
    every = float(embedding_loss(embedding, labels, 3.0, max_cells=99))
    assert len(draws) > 3 and every == float(embedding_loss(embedding, labels, 3.0))


def test_a_perfect_embedding_has_no_loss():
    labels = blocks(3, numbers=4)
    perfect = torch.eye(4)[labels].permute(2, 0, 1)
    assert float(embedding_loss(perfect, labels, 100.0)) == pytest.approx(0, abs=1e-6)
    assert float(embedding_loss(perfect, torch.zeros_like(labels), 5.0)) > 0  # all of it background, and not alike


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_mean_shift_finds_separate_groups(seed, count):
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(count, (80,), generator=generator)
    group[:count] = torch.arange(count)
    features = 3.0 * torch.eye(5)[group] + 0.2 * torch.rand(80, 5, generator=generator)
    clusters = mean_shift(features, 1.0, 80)
    pairs = {*zip(group.tolist(), clusters.tolist(), strict=True)}
    assert len(pairs) == count == len({c for _, c in pairs})


def test_no_point_has_no_cluster():
    assert mean_shift(torch.zeros(0, 3), 1.0, 10).tolist() == []


def test_hdbscan_finds_separate_groups():
    pytest.importorskip("sklearn")
    group = torch.arange(60) % 3
    features = 3.0 * torch.eye(3)[group] + 0.1 * torch.rand(60, 3, generator=torch.Generator().manual_seed(0))
    assert len({*zip(group.tolist(), hdbscan(features, 8).tolist(), strict=True)}) == 3
    assert hdbscan(features[:3], 8).tolist() == [-1, -1, -1]


def perfect_maps(seed: int, stride: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Label map (64, 64) of touching nuclei, and embeddings in which no two of them are alike."""
    _, target = nuclei_example(np.random.default_rng(seed), 64, 6)
    labels = label_maps([target["masks"]], (64, 64))[0]
    coarse = labels[stride // 2 :: stride, stride // 2 :: stride]
    vectors = torch.eye(16)[: int(labels.max()) + 1]
    noise = 0.05 * torch.randn(16, *coarse.shape, generator=torch.Generator().manual_seed(seed))
    return labels, 3 * vectors[coarse].permute(2, 0, 1) + noise


@pytest.mark.parametrize("clustering", ["mean_shift", "hdbscan"])
@pytest.mark.parametrize("seed", range(4))
def test_perfect_embeddings_decode_to_the_cells(seed, clustering):
    if clustering == "hdbscan":
        pytest.importorskip("sklearn")
    labels, embedding = perfect_maps(seed, 1)
    cells = decode_embedding(embedding, None, 1, (64, 64), ClusteringSettings(clustering=clustering))
    found = torch.stack(list(cells.masks))
    for number in range(1, int(labels.max()) + 1):
        cell = labels == number
        if cell.sum() >= 40:
            assert ((cell & found).sum((1, 2)) / (cell | found).sum((1, 2))).max() > 0.9
    assert (cells.scores > 0.9).all() and found.sum(0).max() == 1


def test_the_stride_is_undone():
    labels, embedding = perfect_maps(5, 2)
    cells = decode_embedding(embedding, None, 2, (63, 60), ClusteringSettings(min_area=8))
    assert cells.size == (63, 60)
    found = torch.stack(list(cells.masks))
    for number in range(1, int(labels.max()) + 1):
        cell = labels[:63, :60] == number
        if cell.sum() >= 100:
            assert ((cell & found).sum((1, 2)) / (cell | found).sum((1, 2))).max() > 0.8


def test_equal_embeddings_apart_are_two_cells():
    embedding = torch.zeros(3, 20, 40)
    embedding[0] = 1
    for x in (4, 24):
        embedding[:, 5:15, x : x + 8] = torch.tensor([0.0, 1, 0])[:, None, None]
    cells = decode_embedding(embedding, None, 1, (20, 40), ClusteringSettings(bandwidth=2.0))
    assert sorted(cells.boxes.tolist()) == [[4, 5, 12, 15], [24, 5, 32, 15]]
    assert cells.scores.tolist() == pytest.approx([1, 1])


def test_a_learned_background_decides_where_cells_are_the_majority():
    unit = normalize(torch.randn(3, 10, 10, generator=torch.Generator().manual_seed(0)), dim=0)
    unit[:, :, :9] = torch.tensor([1.0, 0, 0])[:, None, None]  # nearly all of the image is one cell
    background = torch.full((10, 10), 0.1)
    background[:, 9] = 0.9
    cells = decode_embedding(unit, background, 1, (10, 10), ClusteringSettings())
    assert cells.boxes.tolist() == [[0, 0, 9, 10]] and cells.scores.tolist() == pytest.approx([0.9])
    assert len(decode_embedding(unit, None, 1, (10, 10), ClusteringSettings(min_area=50))) == 0


def test_the_background_is_learned_where_asked_for():
    torch.manual_seed(0)
    shared = {"preprocessing": Preprocessing(size=(64, 64)), "backbone": BackboneSettings("resnet18", c0_channels=4)}
    shared |= {"trunk": TrunkSettings(widths=(4, 6, 8, 8))}
    model = CosineEmbeddingNet.build(
        CosineEmbeddingSettings(**shared, heads=EmbeddingHeadSettings(foreground="learned"))
    )
    image, target = nuclei_example(np.random.default_rng(0), 64, 4)
    losses = model([image], [target])
    sum(losses.values()).backward()
    assert model.background.weight.grad.abs().sum() > 0 and "loss_background" in losses
    assert len(model.eval()([image.byte()])) == 1
