"""Training with PyTorch alone: augmentation, samples, schedule, moving average, checkpoints and the loop."""

from kg_detectron.training.augmentation import ColourSettings, GeometrySettings, random_colours, random_window
from kg_detectron.training.average import WeightAverage
from kg_detectron.training.checkpoint import load_checkpoint, save_checkpoint
from kg_detectron.training.dataset import (
    LabelledImage,
    TrainingSamples,
    kind_of_image,
    read_labelled_images,
    target_of_labels,
)
from kg_detectron.training.loop import LoopSettings, Trainer
from kg_detectron.training.sampler import EndlessSampler, Sample, balanced_weights
from kg_detectron.training.schedule import CosineSchedule

__all__ = [
    "ColourSettings",
    "CosineSchedule",
    "EndlessSampler",
    "GeometrySettings",
    "LabelledImage",
    "LoopSettings",
    "Sample",
    "Trainer",
    "TrainingSamples",
    "WeightAverage",
    "balanced_weights",
    "kind_of_image",
    "load_checkpoint",
    "random_colours",
    "random_window",
    "read_labelled_images",
    "save_checkpoint",
    "target_of_labels",
]
