"""Whole models, stage by stage: time, multiply-adds, parameters and peak memory, of inference and of a training step.

Models are built from their configs, with random weights. So that the number of cells is what was asked for whatever
those weights are, each stage gets known input: decoding the maps of a good network, masks the boxes of the cells. The
stages of Mask R-CNN stand under the names of ours: its RPN under the keypoint branch, its box head under decode.
"""

import argparse
import copy
import functools
import importlib.util
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmark.measure import milliseconds, peak_bytes
from benchmark.scenes import cells, network_maps
from kg_detectron.modeling import KeypointGraphNet
from kg_detectron.modeling.cpu_layers import use_cpu_layers
from kg_detectron.modeling.precision import PRECISIONS, autocast

ROOT = Path(__file__).resolve().parents[2]

HAS_DETECTRON2 = importlib.util.find_spec("detectron2") is not None
STAGES = ("backbone", "keypoint branch", "decode", "masks", "paste")
CONFIGS = ("kg_dsb2018", "kg_lite_dsb2018", "mask_rcnn_c4_dsb2018", "mask_rcnn_fpn_dsb2018")
DEFINITIONS = """\
Milliseconds are medians. GMACs are the multiply-adds of convolutions and matrix products (torch.utils.flop_counter).
MiB are the most that the tensors of a stage hold at once beyond its input: on a GPU by PyTorch's allocator; on the CPU
by the allocations that PyTorch's profiler records, without what libraries allocate for themselves. Total is the sum of
the stages, of MiB the largest. Paste ends with the run-length encodings of all masks at the size of the input."""


class Stage(NamedTuple):
    """A part of a model at work: a call, and the modules whose parameters it uses first."""

    run: Callable[[], Any]
    modules: tuple[nn.Module, ...] = ()


class Cost(NamedTuple):
    milliseconds: float
    gmacs: float
    parameters: float  # millions
    mebibytes: float


class KeypointGraphStages:
    """The stages of a keypoint-graph model on one image (1,3,H,W) with known cells."""

    def __init__(self, model: KeypointGraphNet, image: Tensor) -> None:
        self.model = model
        self.image = image
        self.size = image.shape[-1]

    def stages(self, count: int) -> Iterator[tuple[str, Stage]]:
        """Each stage, with the results of those before it as its input, so that only one is held at a time."""
        model, device = self.model, self.image.device.type
        yield "backbone", Stage(lambda: model.backbone(self.image), (model.backbone,))
        features = model.backbone(self.image)
        yield "keypoint branch", Stage(lambda: model.keypoint_branch(features), (model.keypoint_branch,))
        maps, decoded = model.keypoint_branch(features)
        crop_maps = model.segmentation.maps(features, decoded)
        known = network_maps(count, 1, self.size, device, model.decoder.radius, [scale.stride for scale in maps])
        sizes = [(self.size, self.size)]
        yield "decode", Stage(lambda: model.boxes(known, sizes))
        boxes = [cells(count, self.size, 0).to(device)]
        segment = functools.partial(model.segmentation.predict_masks, crop_maps, boxes, sizes)
        yield "masks", Stage(segment, (model.segmentation,))
        yield "paste", Stage(segment()[0].rle)

    def training_losses(self, boxes: Tensor, masks: Tensor) -> dict[str, Tensor]:
        return self.model([self.image[0]], [{"boxes": boxes, "masks": masks}])


class MaskRCNNStages:
    """The stages of one of Detectron2's Mask R-CNNs, likewise."""

    def __init__(self, model: nn.Module, image: Tensor) -> None:
        self.model = model
        self.image = image
        self.size = min(image.shape[2:])

    def stages(self, count: int) -> Iterator[tuple[str, Stage]]:
        from detectron2.modeling import detector_postprocess
        from detectron2.structures import Boxes, ImageList, Instances

        from kg_detectron.d2.evaluators import mask_rles

        model, size = self.model, (self.image.shape[2], self.image.shape[3])
        images, heads = ImageList(self.image, [size]), model.roi_heads
        yield "backbone", Stage(lambda: model.backbone(self.image), (model.backbone,))
        features = model.backbone(self.image)
        propose = functools.partial(model.proposal_generator, images, features)
        yield "keypoint branch", Stage(propose, (model.proposal_generator,))
        proposals, _ = propose()

        def detect() -> None:
            heads.mask_on = False
            heads(images, features, proposals)
            heads.mask_on = True

        box_head = tuple(child for name, child in heads.named_children() if name != "mask_head")
        yield "decode", Stage(detect, box_head)
        known = Instances(size, pred_boxes=Boxes(cells(count, self.size, 0).to(self.image.device)))
        known.scores = torch.ones(count, device=self.image.device)
        known.pred_classes = torch.zeros(count, dtype=torch.int64, device=self.image.device)

        def segment() -> Instances:
            return heads.forward_with_given_boxes(features, [copy.copy(known)])[0]

        yield "masks", Stage(segment, (heads.mask_head,))
        found = segment()
        yield "paste", Stage(lambda: mask_rles(detector_postprocess(found, *size).pred_masks))

    def training_losses(self, boxes: Tensor, masks: Tensor) -> dict[str, Tensor]:
        from detectron2.structures import BitMasks, Boxes, Instances
        from detectron2.utils.events import EventStorage

        truth = Instances(tuple(masks.shape[1:]), gt_boxes=Boxes(boxes), gt_masks=BitMasks(masks))
        truth.gt_classes = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
        with EventStorage():
            return self.model([{"image": self.image[0], "instances": truth}])


def load_stages(
    config: str, size: int | tuple[int, int], device: str, channels_last: bool
) -> KeypointGraphStages | MaskRCNNStages:
    """The model of a config (a file, or a name in configs/), with random weights, on a random image; `size` is its
    side, or height and width."""
    height, width = (size, size) if isinstance(size, int) else size
    image = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0)).to(device)
    torch.manual_seed(0)
    model = _model_of(config, device) if HAS_DETECTRON2 else KeypointGraphNet.build()
    model = getattr(model, "network", model)
    kind = KeypointGraphStages if isinstance(model, KeypointGraphNet) else MaskRCNNStages
    model = model.to(device, memory_format=torch.channels_last if channels_last else torch.preserve_format)
    return kind(model.eval(), image)


def _model_of(config: str, device: str) -> nn.Module:
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    from kg_detectron.d2.config import add_kg_config, drop_initial_weights, merge_config

    cfg = get_cfg()
    add_kg_config(cfg)
    merge_config(cfg, config if config.endswith(".yaml") else str(ROOT / "configs" / f"{config}.yaml"))
    drop_initial_weights(cfg)
    cfg.MODEL.DEVICE = device
    return build_model(cfg)


def measure(call: Callable[[], Any], device: str, repeats: int) -> tuple[float, float, float]:
    """Median milliseconds, GMACs and peak MiB of a call. A first call fills the caches and is counted, not timed."""
    with FlopCounterMode(display=False) as counter:
        peak = peak_bytes(call, device)
    taken = statistics.median(milliseconds(call, device) for _ in range(repeats))
    return taken, counter.get_total_flops() / 2e9, peak / 2**20


@torch.no_grad()
def inference_costs(
    stages: KeypointGraphStages | MaskRCNNStages, counts: Sequence[int], device: str, repeats: int, precision: str
) -> dict[int, dict[str, Cost]]:
    """The cost of each stage for each number of cells; the stages without cells in them are measured once."""
    costs: dict[int, dict[str, Cost]] = {}
    for count in counts:
        costs[count] = {}
        with autocast(precision, torch.device(device)):
            for name, stage in stages.stages(count):
                dense = name in STAGES[:2]
                known = next((c[name] for c in costs.values() if name in c), None) if dense else None
                parameters = sum(p.numel() for module in stage.modules for p in module.parameters()) / 1e6
                if known is None:
                    # Short stages are repeated more often, for they vary more.
                    taken, gmacs, mebibytes = measure(stage.run, device, repeats if dense else 3 * repeats)
                    known = Cost(taken, gmacs, parameters, mebibytes)
                costs[count][name] = known
        costs[count]["total"] = Cost(
            *(sum(c[i] for c in costs[count].values()) for i in range(3)), max(c[3] for c in costs[count].values())
        )
    return costs


def training_costs(
    stages: KeypointGraphStages | MaskRCNNStages, counts: Sequence[int], device: str, repeats: int, precision: str
) -> dict[int, Cost]:
    """The cost of a training step, with an optimiser that keeps no state, for each number of cells."""
    model = stages.model.train()
    use_cpu_layers(model)  # as train_net.py does
    optimizer = torch.optim.SGD(model.parameters(), 1e-6)
    side = stages.size
    costs = {}
    for count in counts:
        boxes = cells(count, side, 0)
        pixel = torch.arange(side) + 0.5
        inside = [(pixel > boxes[:, i, None]) & (pixel < boxes[:, i + 2, None]) for i in (0, 1)]
        boxes, masks = boxes.to(device), (inside[1][:, :, None] & inside[0][:, None]).to(device)

        def step(boxes: Tensor = boxes, masks: Tensor = masks) -> None:
            with autocast(precision, torch.device(device)):
                losses = stages.training_losses(boxes, masks)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()

        taken, gmacs, mebibytes = measure(step, device, repeats)
        costs[count] = Cost(taken, gmacs, sum(p.numel() for p in model.parameters()) / 1e6, mebibytes)
    model.eval()
    return costs


@torch.no_grad()
def speed_of_batching(stages: KeypointGraphStages, count: int, device: str) -> str:
    """Masks of a batch of crops against the same one by one, in turn."""
    model = stages.model
    _, maps = model.maps(stages.image)
    boxes, branch = cells(count, stages.size, 0).to(device), model.segmentation
    calls = (lambda: branch(maps, [boxes]), lambda: [branch.segment_crop([m[0] for m in maps], box) for box in boxes])
    taken = [[milliseconds(call, device) for call in calls] for _ in range(4)][1:]
    batched, single = (statistics.median(times) for times in zip(*taken, strict=True))
    return f"{single:.0f} ms one by one, {batched:.0f} ms in batches, {single / batched:.1f} times as fast"


def row(texts: Sequence[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def print_costs(title: str, costs: dict[str, dict[int, dict[str, Cost]]], field: str, digits: int) -> None:
    """One table of one quantity: a line for each model and number of cells."""
    print(f"\n**{title}**\n")
    print(row(["model", "cells", *STAGES, "total"]))
    print(row(["---", *["---:"] * (len(STAGES) + 2)]))
    for config, counts in costs.items():
        for count, stages in counts.items():
            print(row([config, str(count), *(f"{getattr(cost, field):.{digits}f}" for cost in stages.values())]))


def print_times(costs: dict[str, dict[int, dict[str, Cost]]]) -> None:
    """Times with their ratio to the last model's, and the share of decode and masks together."""
    last = list(costs)[-1]
    print("\n**Inference, ms**\n")
    print(row(["model", "cells", *STAGES, "total", f"total / `{last}`", "decode + masks, %"]))
    print(row(["---", *["---:"] * (len(STAGES) + 4)]))
    for config, counts in costs.items():
        for count, stages in counts.items():
            total = stages["total"].milliseconds
            ratio = total / costs[last][count]["total"].milliseconds
            share = 100 * (stages["decode"].milliseconds + stages["masks"].milliseconds) / total
            times = (f"{cost.milliseconds:.1f}" for cost in stages.values())
            print(row([config, str(count), *times, f"{ratio:.2f}", f"{share:.1f}"]))


def print_training(costs: dict[str, dict[int, Cost]]) -> None:
    last = list(costs)[-1]
    print("\n**Training step, one image**\n")
    print(row(["model", "cells", "ms", f"ms / `{last}`", "GMACs", "M parameters", "MiB"]))
    print(row(["---", *["---:"] * 6]))
    for config, counts in costs.items():
        for count, cost in counts.items():
            ratio = cost.milliseconds / costs[last][count].milliseconds
            figures = f"{cost.milliseconds:.0f}", f"{ratio:.2f}", f"{cost.gmacs:.1f}"
            print(row([config, str(count), *figures, f"{cost.parameters:.2f}", f"{cost.mebibytes:.0f}"]))


def benchmark_models(arguments: argparse.Namespace, device: str) -> None:
    """All models on one device, as tables in Markdown."""
    configs = arguments.configs
    if not HAS_DETECTRON2:
        print("Detectron2 is not installed: only the paper's keypoint-graph network, and no config, is measured.")
        configs = ["kg"]
    counts = arguments.cells or ([0, 300] if arguments.quick else [0, 30, 300])
    repeats = 1 if arguments.quick else arguments.repeats
    inference, training, batching = {}, {}, {}
    for config in configs:
        stages = load_stages(config, arguments.size, device, arguments.channels_last)
        print(f"measuring {config}", file=sys.stderr, flush=True)
        inference[config] = inference_costs(stages, counts, device, repeats, arguments.precision)
        if isinstance(stages, KeypointGraphStages) and max(counts):
            batching[config] = speed_of_batching(stages, max(counts), device)
        if not arguments.no_training:
            training[config] = training_costs(stages, counts, device, 1, arguments.precision)
    layout = ", channels last" if arguments.channels_last else ""
    print(f"\nOne image of {arguments.size}x{arguments.size}, {arguments.precision}{layout}.\n\n{DEFINITIONS}")
    print_times(inference)
    for title, field, digits in (("GMACs", "gmacs", 2), ("M parameters", "parameters", 2), ("MiB", "mebibytes", 0)):
        print_costs(f"Inference, {title}", inference, field, digits)
    for config, text in batching.items():
        print(f"\nMasks of {max(counts)} cells, `{config}`: {text}.")
    if training:
        print_training(training)


def add_command(commands: Any) -> None:
    """Add ``model`` to the commands of tools/benchmark.py."""
    command = commands.add_parser("model", help="whole models, stage by stage", description=__doc__)
    command.add_argument("--device", choices=("cpu", "cuda"), help="only this one; every device at hand otherwise")
    names = "names in configs/, or files; ratios are to the last (%(default)s)"
    command.add_argument("--configs", nargs="+", default=list(CONFIGS), metavar="CONFIG", help=names)
    command.add_argument("--size", type=int, default=512, help="side of the image, pixels (%(default)s)")
    command.add_argument("--cells", type=int, nargs="+", help="numbers of cells (0 30 300)")
    command.add_argument("--repeats", type=int, default=3, help="of each measurement (%(default)s)")
    command.add_argument("--precision", choices=tuple(PRECISIONS), default="float32", help="(%(default)s)")
    command.add_argument("--channels-last", action="store_true", help="all models in this memory format")
    command.add_argument("--no-training", action="store_true", help="inference only")
    command.add_argument("--quick", action="store_true", help="one repeat, 0 and 300 cells")
    command.set_defaults(benchmark=benchmark_models)
