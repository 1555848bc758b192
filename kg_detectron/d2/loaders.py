"""Loaders of training, validation and test images."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetFromList,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.utils import comm
from torch.utils.data import DataLoader

from kg_detectron.d2.mapper import CellMapper
from kg_detectron.training.sampler import EndlessSampler, SampleDataset


def training_records(cfg: CfgNode) -> list[dict[str, Any]]:
    """The records of ``cfg.DATASETS.TRAIN`` that are trained on."""
    names = list(cfg.DATASETS.TRAIN)
    return get_detection_dataset_dicts(names, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)


def build_train_loader(cfg: CfgNode) -> DataLoader:
    """Endless batches of augmented images of ``cfg.DATASETS.TRAIN``, the same under one ``cfg.SEED`` (0 or more).

    Which image comes when, and how it is augmented, depends on the seed and the number of samples before it alone, not
    on ``cfg.DATALOADER.NUM_WORKERS``. ``.sampler`` is an `EndlessSampler`; set its ``start`` before the first batch to
    go on with a run.

    Raises:
        ValueError: where the batch does not divide among the processes, and for what would make the samples depend
    on more than their place: other samplers than TrainingSampler, grouping by aspect ratio (needless here, for all
    images get one size).
    """
    if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        raise ValueError(f"DATALOADER.SAMPLER_TRAIN must be TrainingSampler, got {cfg.DATALOADER.SAMPLER_TRAIN!r}")
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        raise ValueError("DATALOADER.ASPECT_RATIO_GROUPING must be False: all images are resized to INPUT.SIZE")
    rank, processes, batch = comm.get_rank(), comm.get_world_size(), cfg.SOLVER.IMS_PER_BATCH
    if batch < 1 or batch % processes:
        raise ValueError(f"SOLVER.IMS_PER_BATCH must be a positive multiple of the {processes} processes, got {batch}")
    records = training_records(cfg)
    return _SteadyLoader(
        # A list that worker processes share, instead of a copy for each.
        SampleDataset(DatasetFromList(records, copy=False), CellMapper(cfg, is_train=True)),
        sampler=EndlessSampler(len(records), cfg.SEED, rank=rank, world_size=processes),
        batch_size=batch // processes,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=list,
        worker_init_fn=_leave_signals_to_main_process,
        # The loader draws a number for its workers, which nobody uses; without this, from the training's generator.
        generator=torch.Generator(),
    )


class _SteadyLoader(DataLoader):
    """A loader whose workers are born with SIGTERM blocked, in all their threads, those of libraries too."""

    def __iter__(self) -> Any:
        if not hasattr(signal, "pthread_sigmask"):
            return super().__iter__()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_main_process(worker: int) -> None:
    """Ctrl-C and schedulers signal all processes; the main one then ends its iteration, and needs its workers for that.

    A SIGTERM of the main process itself, which ends its workers so at its exit, still ends this one.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_the_parent_says, daemon=True).start()


def _end_when_the_parent_says() -> None:
    parent = multiprocessing.parent_process()  # the loader's, which need not be the one that forked this one
    while parent is not None and signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)


def build_validation_loader(cfg: CfgNode) -> Iterable[list[dict[str, Any]]]:
    """Every image of ``cfg.DATASETS.VALIDATION`` once, with targets and without augmentation, one image a batch.

    One image a batch makes the mean loss over the images independent of the batch size and the number of processes.

    Raises:
        ValueError: where ``cfg.DATASETS.VALIDATION`` is empty.
    """
    if not cfg.DATASETS.VALIDATION:
        raise ValueError("DATASETS.VALIDATION is empty: the validation loss needs a dataset")
    mapper = CellMapper(cfg, is_train=False, with_targets=True)
    return _build_finite_loader(cfg, list(cfg.DATASETS.VALIDATION), mapper)


def build_test_loader(cfg: CfgNode, name: str) -> Iterable[list[dict[str, Any]]]:
    """Every image of the dataset `name` once, without targets and augmentation, one image a batch."""
    return _build_finite_loader(cfg, name, CellMapper(cfg, is_train=False))


def _build_finite_loader(cfg: CfgNode, names: str | list[str], mapper: CellMapper) -> DataLoader:
    loader = build_detection_test_loader(cfg, names, mapper=mapper)
    return _SteadyLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        sampler=loader.sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        worker_init_fn=_leave_signals_to_main_process,
    )
