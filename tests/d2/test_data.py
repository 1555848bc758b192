"""Registration, augmentations, mapper and loaders of kg_detectron.d2."""

import collections
import copy
import multiprocessing
import subprocess
import time

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from kg_detectron.cells.run_lengths import decode_runs, foreground
from kg_detectron.d2.augmentation import (
    ExactResize,
    RandomBrightness,
    RandomCellCrop,
    RandomChannelOrder,
    RandomContrast,
    RandomExpand,
    build_augmentations,
    scale_intensity,
)
from kg_detectron.d2.config import add_kg_config
from kg_detectron.d2.datasets import register_all_cells, register_cells
from kg_detectron.d2.loaders import build_test_loader, build_train_loader, build_validation_loader
from kg_detectron.d2.mapper import CellMapper, _label_layers
from kg_detectron.io.coco import coco_annotation, encode_mask, write_coco

HEIGHT, WIDTH = 60, 90
NAME = "cells_of_the_data_tests"


def make_cfg(**aug) -> CfgNode:
    cfg = get_cfg()
    add_kg_config(cfg)
    cfg.INPUT.SIZE = (48, 64)
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SEED = 5
    for key, value in aug.items():
        cfg.INPUT.AUGMENTATION[key] = value
    return cfg


def ellipse(x: float, y: float, rx: float, ry: float) -> np.ndarray:
    """(H,W) bool."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return ((columns + 0.5 - x) / rx) ** 2 + ((rows + 0.5 - y) / ry) ** 2 <= 1


def cells_of(index: int) -> list[np.ndarray]:
    """Image 0 has no cell, image 1 has one, image 2 has many, some overlapping, some at the border, one tiny."""
    if index == 2:
        grid = [ellipse(x, y, 7, 5) for x in range(4, WIDTH, 12) for y in range(3, HEIGHT, 9)]
        return [*grid, ellipse(45, 30, 30, 4), ellipse(45, 30, 3, 25), ellipse(80.5, 50.5, 1, 1)]
    return [ellipse(40, 25, 12, 6)] * index


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Records of a dataset of three images, registered as NAME, whose file calls its only category 7."""
    folder = tmp_path_factory.mktemp("cells")
    images, annotations = [], []
    rng = np.random.default_rng(0)
    for index in range(3):
        image = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{index}.png"), image)
        images.append({"id": index + 1, "file_name": f"{index}.png", "height": HEIGHT, "width": WIDTH})
        for mask in cells_of(index):
            annotations.append(
                coco_annotation(mask, image_id=index + 1, annotation_id=len(annotations) + 1, category_id=7)
            )
    write_coco(folder / "cells.json", images, annotations, [{"id": 7, "name": "nucleus"}], "made by a test")
    register_cells(NAME, str(folder / "cells.json"), str(folder))
    yield DatasetCatalog.get(NAME)
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


# Registration


def test_registration_is_lazy_and_names_the_missing_file(tmp_path):
    register_cells("nowhere", str(tmp_path / "absent.json"), str(tmp_path))
    try:
        metadata = MetadataCatalog.get("nowhere")
        assert metadata.json_file == str(tmp_path / "absent.json")
        assert metadata.image_root == str(tmp_path)
        assert metadata.evaluator_type == "cells"
        with pytest.raises(FileNotFoundError, match="absent.json"):
            DatasetCatalog.get("nowhere")
    finally:
        DatasetCatalog.remove("nowhere")
        MetadataCatalog.remove("nowhere")


def test_metadata_follows_the_file(dataset):
    assert [len(record["annotations"]) for record in dataset] == [0, 1, len(cells_of(2))]
    metadata = MetadataCatalog.get(NAME)
    assert metadata.thing_classes == ["nucleus"]
    assert metadata.thing_dataset_id_to_contiguous_id == {7: 0}
    cell = dataset[1]["annotations"][0]
    assert cell["bbox_mode"] == BoxMode.XYWH_ABS and cell["category_id"] == 0


def test_all_names_are_registered_once(monkeypatch, tmp_path):
    names = {f"{name}_{split}" for name in ("neural", "dsb2018") for split in ("train", "val", "test")}
    names |= {"synthetic_train", "synthetic_val"}
    known = {name: (DatasetCatalog.pop(name), MetadataCatalog.pop(name)) for name in names if name in DatasetCatalog}
    try:
        monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
        register_all_cells()
        register_all_cells("elsewhere")  # keeps the first
        assert names <= set(DatasetCatalog)
        assert MetadataCatalog.get("dsb2018_val").json_file == str(tmp_path / "dsb2018" / "instances_val.json")
        assert MetadataCatalog.get("dsb2018_val").image_root == str(tmp_path / "dsb2018" / "val")
    finally:
        for name in names & set(DatasetCatalog):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        for name, (load, metadata) in known.items():
            DatasetCatalog.register(name, load)
            MetadataCatalog[name] = metadata


# Masks


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.05, 0.5, 0.95, 1.0]))
def test_pixels_of_run_lengths(height, width, seed, density):
    mask = np.random.default_rng(seed).random((height, width)) < density
    counts = encode_mask(mask)["counts"]
    assert foreground(decode_runs(counts)).tolist() == np.flatnonzero(mask.T.ravel()).tolist()
    assert foreground(decode_runs(counts.encode())).tolist() == foreground(decode_runs(counts)).tolist()


def test_as_few_layers_as_needed():
    def layers_of(masks):
        return _label_layers([np.flatnonzero(mask.T.ravel()) for mask in masks], HEIGHT, WIDTH)

    assert layers_of([]) == []
    masks = cells_of(2)
    crossing = masks[-3:-1]
    disjoint = [ellipse(x, y, 4, 4) for x in range(5, 85, 10) for y in range(5, 55, 10)]
    assert len(layers_of(disjoint)) == 1
    assert len(layers_of([*disjoint, *crossing])) == 3
    layers = layers_of(masks)
    for label, mask in enumerate(masks, start=1):
        (holder,) = [layer for layer in layers if (layer == label).any()]
        assert np.array_equal(holder == label, mask)


# Mapper


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("seed", range(12))
def test_mapper_equals_slow_warping(dataset, index, seed):
    """Every mask warped alone, pixel by pixel, through the transforms' coordinates: one frame for all."""
    cfg = make_cfg()
    np.random.seed(seed)
    mapped = CellMapper(cfg, is_train=True)(dataset[index])
    cells = dataset[index]["annotations"]
    boxes = np.array([cell["bbox"] for cell in cells], float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    np.random.seed(seed)
    frame = T.AugInput(cv2.imread(dataset[index]["file_name"]).astype(np.float32), boxes=boxes)
    transforms = T.AugmentationList(build_augmentations(cfg, is_train=True))(frame)
    assert torch.equal(mapped["image"], torch.from_numpy(frame.image.transpose(2, 0, 1).copy()))
    assert mapped["image"].dtype == torch.float32

    # The transforms are x -> a x + b on each axis: find the pixel of the file below each pixel centre of the output.
    (x0, y0), (x1, y1) = transforms.apply_coords(np.array([[0.0, 0.0], [1.0, 1.0]]))
    source_x = np.floor((np.arange(64) + 0.5 - x0) / (x1 - x0) + 1e-9).astype(int)
    source_y = np.floor((np.arange(48) + 0.5 - y0) / (y1 - y0) + 1e-9).astype(int)
    inside = ((source_y >= 0) & (source_y < HEIGHT))[:, None] & ((source_x >= 0) & (source_x < WIDTH))
    expected_masks, expected_boxes = [], []
    for cell in cells:
        mask = coco_mask.decode(cell["segmentation"]).astype(bool)
        warped = mask[source_y.clip(0, HEIGHT - 1)][:, source_x.clip(0, WIDTH - 1)] & inside
        ys, xs = np.nonzero(warped)
        if len(ys) and np.ptp(ys) >= 1 and np.ptp(xs) >= 1:
            expected_masks.append(warped)
            expected_boxes.append([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
    instances = mapped["instances"]
    masks, boxes = instances.gt_masks.tensor, instances.gt_boxes.tensor
    assert instances.image_size == (48, 64)
    assert masks.shape == (len(expected_masks), 48, 64) and masks.dtype == torch.bool
    assert boxes.shape == (len(expected_masks), 4) and boxes.dtype == torch.float32
    assert instances.gt_classes.tolist() == [0] * len(expected_masks)
    assert all(np.array_equal(mask, expected) for mask, expected in zip(masks.numpy(), expected_masks, strict=True))
    assert boxes.tolist() == expected_boxes


def test_boxes_are_those_of_the_masks(dataset):
    mapper = CellMapper(make_cfg(), is_train=True)
    np.random.seed(0)
    for _ in range(20):
        instances = mapper(dataset[2])["instances"]
        assert torch.equal(instances.gt_masks.get_bounding_boxes().tensor, instances.gt_boxes.tensor)
        sides = instances.gt_boxes.tensor[:, 2:] - instances.gt_boxes.tensor[:, :2]
        assert (sides >= 2).all()


def test_testing_gives_the_resized_image_alone(dataset):
    mapped = CellMapper(make_cfg(), is_train=False)(dataset[2])
    assert set(mapped) == {"image", "file_name", "image_id", "height", "width"}
    assert mapped["image"].shape == (3, 48, 64)
    assert (mapped["height"], mapped["width"], mapped["image_id"]) == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("architecture", ["KGInstanceSegmentation", "CellInstanceSegmentation"])
def test_models_of_the_core_are_tested_on_raw_images(dataset, tmp_path, architecture):
    """They prepare images themselves; in training the mapper does it."""
    deep = {**dataset[1], "file_name": str(tmp_path / "deep.png")}
    raw = cv2.imread(dataset[1]["file_name"]).astype(np.uint16) * 7
    cv2.imwrite(deep["file_name"], raw)
    cfg = make_cfg()
    cfg.MODEL.META_ARCHITECTURE, cfg.INPUT.NORMALISATION = architecture, "percentile"
    mapped = CellMapper(cfg, is_train=False)(deep)
    assert np.array_equal(mapped["image"].permute(1, 2, 0).numpy(), raw)
    assert (mapped["height"], mapped["width"]) == (HEIGHT, WIDTH)
    trained = CellMapper(cfg, is_train=False, with_targets=True)(deep)
    assert trained["image"].shape == (3, 48, 64) and trained["image"].max() > 200
    cfg.INPUT.FORMAT = "RGB"
    with pytest.raises(ValueError, match=r"INPUT\.FORMAT: expected BGR"):
        CellMapper(cfg, is_train=True)


def test_targets_without_augmentation(dataset):
    cfg = make_cfg()
    cfg.INPUT.SIZE = (HEIGHT, WIDTH)
    mapped = CellMapper(cfg, is_train=False, with_targets=True)(dataset[2])
    assert np.array_equal(mapped["image"].permute(1, 2, 0), cv2.imread(dataset[2]["file_name"]))
    masks = mapped["instances"].gt_masks.tensor.numpy()
    assert np.array_equal(masks, np.stack(cells_of(2)))


def test_rgb(dataset):
    cfg = make_cfg()
    bgr = CellMapper(cfg, is_train=False)(dataset[1])["image"]
    cfg.INPUT.FORMAT = "RGB"
    assert torch.equal(CellMapper(cfg, is_train=False)(dataset[1])["image"], bgr.flip(0))


def test_sixteen_bits_survive(dataset, tmp_path):
    record = copy.deepcopy(dataset[1])
    record["file_name"] = str(tmp_path / "deep.png")
    ramp = np.linspace(0, 65535, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)
    cv2.imwrite(record["file_name"], ramp)
    mapper = CellMapper(make_cfg(), is_train=True)
    for seed in range(10):
        np.random.seed(seed)
        image = mapper(record)["image"]
        assert image.dtype == torch.float32
        assert image.min() >= 0 and image.max() <= 255 and len(image.unique()) > 256


def test_an_image_of_16_bits_trains_and_tests_as_its_8_bits(dataset, tmp_path):
    """Whatever the normalisation; without it, images of another range are refused with the file's name."""
    image = cv2.imread(dataset[1]["file_name"])
    deep = {**dataset[1], "file_name": str(tmp_path / "deep.png")}
    cv2.imwrite(deep["file_name"], image.astype(np.uint16) * 257)
    highest = {}
    for kind in ("fixed", "percentile"):
        cfg = make_cfg()
        cfg.INPUT.NORMALISATION, cfg.INPUT.PERCENTILES = kind, (5.0, 90.0)
        for is_train in (False, True):
            mapped = []
            for record in (dataset[1], deep):
                np.random.seed(3)
                mapped.append(CellMapper(cfg, is_train=is_train)(record)["image"])
            assert torch.equal(*mapped)
            highest[kind, is_train] = mapped[0].max()
    assert highest["percentile", False] > highest["fixed", False]
    cv2.imwrite(deep["file_name"], image.astype(np.uint16))
    assert CellMapper(cfg, is_train=False)(deep)["image"].max() == highest["percentile", False]
    with pytest.raises(ValueError, match=r"deep\.png.*12 bits"):
        CellMapper(make_cfg(), is_train=False)(deep)
    cfg.INPUT.NORMALISATION = "none"
    with pytest.raises(ValueError, match="normalisation.*none"):
        CellMapper(cfg, is_train=False)


def test_records_are_not_changed(dataset):
    before = copy.deepcopy(dataset)
    mapper = CellMapper(make_cfg(), is_train=True)
    np.random.seed(1)
    for record in dataset * 5:
        mapper(record)
    assert dataset == before


def test_mapper_errors_name_the_file(dataset):
    mapper = CellMapper(make_cfg(), is_train=True)
    with pytest.raises(ValueError, match=r"1\.png.*\(61, 90\).*\(60, 90\)"):
        mapper({**dataset[1], "height": 61})
    polygon = {**dataset[1]["annotations"][0], "segmentation": [[0, 0, 5, 0, 5, 5]]}
    with pytest.raises(ValueError, match=r"1\.png.*register_cells"):
        mapper({**dataset[1], "annotations": [polygon]})
    cfg = make_cfg()
    cfg.INPUT.FORMAT = "L"
    with pytest.raises(ValueError, match=r"INPUT\.FORMAT.*'L'"):
        CellMapper(cfg)


def test_real_images(shared):
    register_cells("real", str(shared / "dsb2018/instances_val.json"), str(shared / "dsb2018/val"))
    try:
        records = DatasetCatalog.get("real")[:40:8]
    finally:
        DatasetCatalog.remove("real")
        MetadataCatalog.remove("real")
    for record in records:
        cfg = make_cfg()
        cfg.INPUT.SIZE = (record["height"], record["width"])
        instances = CellMapper(cfg, is_train=False, with_targets=True)(record)["instances"]
        masks = [coco_mask.decode(cell["segmentation"]) for cell in record["annotations"]]
        kept = [mask for mask in masks if mask.any(0).sum() >= 2 and mask.any(1).sum() >= 2]
        assert len(kept) > 0
        assert np.array_equal(instances.gt_masks.tensor.numpy(), np.stack(kept))


# Augmentations


@given(
    st.integers(1, 50), st.integers(1, 50), st.sampled_from([0.1, 0.3, 0.5, 1.0]), st.integers(0, 2**32 - 1), st.data()
)
def test_crop_keeps_a_centre(height, width, smallest, seed, draw):
    boxes = []
    for _ in range(draw.draw(st.integers(0, 4))):
        x1, y1 = draw.draw(st.integers(0, width - 1)), draw.draw(st.integers(0, height - 1))
        boxes.append([x1, y1, draw.draw(st.integers(x1 + 1, width)), draw.draw(st.integers(y1 + 1, height))])
    boxes = np.array(boxes, float).reshape(-1, 4)
    np.random.seed(seed)
    crop = RandomCellCrop(smallest).get_transform(np.zeros((height, width, 3), np.uint8), boxes)
    assert 0 <= crop.x0 and crop.x0 + crop.w <= width and 0 <= crop.y0 and crop.y0 + crop.h <= height
    assert crop.w >= max(1, smallest * width - 0.5) and crop.h >= max(1, smallest * height - 0.5)
    # The sides are rounded to pixels, at least one.
    assert (crop.w - 1) / width <= 2 * (crop.h + 1) / height
    assert (crop.h - 1) / height <= 2 * (crop.w + 1) / width
    if len(boxes):
        x, y = (boxes[:, :2] + boxes[:, 2:]).T / 2
        assert ((crop.x0 <= x) & (x < crop.x0 + crop.w) & (crop.y0 <= y) & (y < crop.y0 + crop.h)).any()


def test_expansion_places_the_image_on_its_own_background():
    image = np.full((20, 30, 3), (10, 60, 200), np.uint8)
    image[5:15, 5:25] = 255
    np.random.seed(0)
    sizes, places = set(), set()
    for _ in range(50):
        expand = RandomExpand(2.0).get_transform(image)
        canvas = expand.apply_image(image)
        x, y = expand.apply_coords(np.array([[0.0, 0.0]]))[0].astype(int)
        assert np.array_equal(canvas[y : y + 20, x : x + 30], image)
        assert 20 <= canvas.shape[0] <= 40 and 30 <= canvas.shape[1] <= 60
        rest = np.ones(canvas.shape[:2], bool)
        rest[y : y + 20, x : x + 30] = False
        assert (canvas[rest] == (10, 60, 200)).all()
        labels = expand.apply_segmentation(np.ones((20, 30), np.int32))
        assert labels.shape == canvas.shape[:2] and np.array_equal(labels == 0, rest)
        sizes.add(canvas.shape)
        places.add((x, y))
    assert len(sizes) > 10 and len(places) > 10
    filled = RandomExpand(2.0, fill=3).get_transform(image).apply_image(image)
    assert (filled == 3).all(axis=2).any()


@pytest.mark.parametrize("size", [(100, 100), (37, 53), (200, 30), (61, 210), (60, 90)])
def test_a_box_drawn_on_the_image_lands_where_its_coordinates_do(size):
    image = np.zeros((60, 90, 3), np.float32)
    image[20:44, 30:66] = 200.0
    resize = ExactResize(size).get_transform(image)
    x1, y1, x2, y2 = resize.apply_box(np.array([[30.0, 20.0, 66.0, 44.0]]))[0]
    resized = resize.apply_image(image)[:, :, 0]
    assert resized.shape == size
    mass = resized.sum()
    rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
    assert (resized * columns).sum() / mass == pytest.approx((x1 + x2) / 2, abs=0.1)
    assert (resized * rows).sum() / mass == pytest.approx((y1 + y2) / 2, abs=0.1)
    assert mass / 200 == pytest.approx((x2 - x1) * (y2 - y1), rel=2e-3)
    labels = resize.apply_segmentation((image[:, :, 0] > 0).astype(np.int32) * 70000)
    ys, xs = np.nonzero(labels)
    assert np.abs(np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) - (x1, y1, x2, y2)).max() <= 0.5
    assert labels.max() == 70000
    assert np.allclose(resize.inverse().apply_box(np.array([[x1, y1, x2, y2]])), [[30, 20, 66, 44]])


def test_probabilities():
    """About half of the images get each augmentation, independently."""
    image, boxes = np.full((40, 60, 3), 100, np.uint8), np.array([[10.0, 10.0, 30.0, 30.0]])
    augmentations = T.AugmentationList(build_augmentations(make_cfg(), is_train=True))
    np.random.seed(0)
    counts = collections.Counter()
    rounds = 1000
    for _ in range(rounds):
        for transform in augmentations(T.AugInput(image, boxes=boxes.copy())).transforms:
            counts[getattr(getattr(transform, "op", None), "func", type(transform)).__name__] += 1
    assert counts.pop("ExactResizeTransform") == rounds
    assert counts.pop("scale_intensity") == pytest.approx(2 * rounds / 2, rel=0.1)  # contrast and brightness
    del counts["NoOpTransform"]
    assert set(counts) == {"ExpandTransform", "CropTransform", "HFlipTransform", "VFlipTransform", "take"}
    assert all(count == pytest.approx(rounds / 2, rel=0.12) for count in counts.values())


def test_switched_off_augmentations_are_absent():
    cfg = make_cfg(EXPAND=1.0, CROP=1.0, FLIP=False, CONTRAST=(1.0, 1.0), BRIGHTNESS=0.0, PERMUTE_CHANNELS=False)
    assert [type(step) for step in build_augmentations(cfg, is_train=True)] == [ExactResize]
    assert [type(step) for step in build_augmentations(make_cfg(), is_train=False)] == [ExactResize]


def test_intensities():
    image = np.array([[[0, 100, 250]]], np.float32)
    assert scale_intensity(image, 1.5, 0.0).tolist() == [[[0, 150, 255]]]
    assert scale_intensity(image, 1.0, -30.5).tolist() == [[[0, 69.5, 219.5]]]
    floats = scale_intensity(image, 0.5, 0.25)
    assert floats.dtype == np.float32 and floats.tolist() == [[[0.25, 50.25, 125.25]]]
    np.random.seed(0)
    image = np.full((4, 4, 3), 100, np.uint8)
    values = [RandomContrast(0.5, 1.5).get_transform(image).apply_image(image)[0, 0, 0] for _ in range(200)]
    assert min(values) >= 50 and max(values) <= 150 and max(values) - min(values) > 80
    values = [RandomBrightness(32).get_transform(image).apply_image(image)[0, 0, 0] for _ in range(200)]
    assert min(values) >= 68 and max(values) <= 132 and max(values) - min(values) > 50
    colours = np.full((4, 4, 3), (1, 2, 3), np.uint8)
    orders = {tuple(RandomChannelOrder().get_transform(colours).apply_image(colours)[0, 0].tolist()) for _ in range(99)}
    assert len(orders) == 6


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("EXPAND", 0.5, "expansion.*0.5"),
        ("CROP", 0.0, "crop.*0.0"),
        ("CROP", 1.5, "crop.*1.5"),
        ("CONTRAST", (1.5, 0.5), "contrast.*1.5, 0.5"),
        ("BRIGHTNESS", -1.0, "brightness.*-1.0"),
    ],
)
def test_augmentation_out_of_range(key, value, message):
    with pytest.raises(ValueError, match=message):
        build_augmentations(make_cfg(**{key: value}), is_train=True)


# Loaders


def batches(cfg: CfgNode, number: int) -> list[torch.Tensor]:
    loader = iter(build_train_loader(cfg))
    return [torch.stack([mapped["image"] for mapped in next(loader)]) for _ in range(number)]


def test_workers_repeat_themselves_under_one_seed(dataset):
    cfg = make_cfg()
    cfg.DATASETS.TRAIN = (NAME,)
    cfg.DATALOADER.NUM_WORKERS = 2
    first, again = batches(cfg, 3), batches(cfg, 3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first[0].shape == (2, 3, 48, 64)
    cfg.SEED = 6
    assert not all(torch.equal(a, b) for a, b in zip(first, batches(cfg, 3), strict=True))


def test_training_images_without_cells_stay(dataset):
    cfg = make_cfg()
    cfg.DATASETS.TRAIN = (NAME,)
    loader = iter(build_train_loader(cfg))
    assert 1 in {mapped["image_id"] for _ in range(3) for mapped in next(loader)}


def test_validation_loader_is_finite_and_fixed(dataset):
    cfg = make_cfg()
    cfg.DATASETS.VALIDATION = (NAME,)
    loader = build_validation_loader(cfg)
    first, again = list(loader), list(loader)
    assert [[mapped["image_id"] for mapped in batch] for batch in first] == [[1], [2], [3]]
    assert [len(batch[0]["instances"]) for batch in first][:2] == [0, 1]
    assert first[0][0]["instances"].gt_boxes.tensor.shape == (0, 4)
    assert first[0][0]["instances"].gt_masks.tensor.shape == (0, 48, 64)
    assert all(torch.equal(a[0]["image"], b[0]["image"]) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("kind", ["validation", "test"])
def test_signals_to_all_processes_leave_an_evaluation_its_workers(dataset, kind):
    cfg = make_cfg()
    cfg.DATASETS.VALIDATION = (NAME,)
    cfg.DATALOADER.NUM_WORKERS = 1
    loader = build_validation_loader(cfg) if kind == "validation" else build_test_loader(cfg, NAME)
    batches = iter(loader)
    seen = [next(batches)]
    for worker in multiprocessing.active_children():
        for name in ("-INT", "-TERM"):
            subprocess.run(["kill", name, str(worker.pid)], check=True)  # not from the main process
    time.sleep(0.5)
    assert len(seen + list(batches)) == 3


def test_validation_needs_a_dataset():
    with pytest.raises(ValueError, match=r"DATASETS\.VALIDATION"):
        build_validation_loader(make_cfg())
