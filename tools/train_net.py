#!/usr/bin/env python
"""Train or evaluate a model on cells: `train_net.py --config-file configs/kg_dsb2018.yaml --num-gpus 4`.

Runs the keypoint-graph model and Mask R-CNN alike, on one or several GPUs or machines, or on the CPU
(`MODEL.DEVICE cpu`). `--eval-only` evaluates `MODEL.WEIGHTS`, `--resume` continues from the last checkpoint of
`OUTPUT_DIR`, and further `KEY VALUE` pairs override the config.
"""

import contextlib
import os
from argparse import Namespace
from collections.abc import Iterable

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, default_argument_parser, default_setup, hooks, launch
from detectron2.evaluation import DatasetEvaluator
from detectron2.solver import get_default_optimizer_params
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from kg_detectron.d2 import CellMapper, add_kg_config, register_files
from kg_detectron.d2.data import build_train_loader, build_validation_loader
from kg_detectron.d2.evaluation import build_evaluators
from kg_detectron.d2.hooks import EarlyStopping, StopTraining, ValidationLoss
from kg_detectron.d2.modeling import ModelDescription
from kg_detectron.d2.solver import build_lr_scheduler

# Checkpoints that stay beside model_best.pth and model_final.pth.
CHECKPOINTS_TO_KEEP = 2


class Trainer(DefaultTrainer):
    """Detectron2's trainer with the data, optimiser, evaluation and early stopping of this project."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        description = ModelDescription.of(cfg)
        if description is not None:
            self.checkpointer.add_checkpointable(ModelDescription.KEY, description)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = super().build_model(cfg)
        return model.to(memory_format=torch.channels_last) if cfg.MODEL.CHANNELS_LAST else model

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[list[dict]]:
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[list[dict]]:
        return build_detection_test_loader(cfg, dataset_name, mapper=CellMapper(cfg, is_train=False))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        folder = os.path.basename(dataset_name).removesuffix(".json")  # of a dataset that is named by its file
        return build_evaluators(cfg, dataset_name, os.path.join(cfg.OUTPUT_DIR, "inference", folder))

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        if cfg.SOLVER.OPTIMIZER == "SGD":
            return super().build_optimizer(cfg, model)
        if cfg.SOLVER.OPTIMIZER != "ADAM":
            raise ValueError(f"SOLVER.OPTIMIZER: expected SGD or ADAM, got {cfg.SOLVER.OPTIMIZER!r}")
        parameters = get_default_optimizer_params(
            model,
            base_lr=cfg.SOLVER.BASE_LR,
            weight_decay=cfg.SOLVER.WEIGHT_DECAY,
            weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
            bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
            weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        )
        return torch.optim.Adam(parameters, cfg.SOLVER.BASE_LR)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return build_lr_scheduler(cfg, optimizer)

    def build_hooks(self) -> list[HookBase]:
        cfg, default = self.cfg, super().build_hooks()
        for hook in default:
            if isinstance(hook, hooks.PeriodicCheckpointer):
                hook.max_to_keep = CHECKPOINTS_TO_KEEP
        if not cfg.DATASETS.VALIDATION:
            return default
        stop = cfg.SOLVER.EARLY_STOPPING
        # After the timer and the schedule, before the checkpoints, which hold the state of these.
        place = 1 + next(i for i, hook in enumerate(default) if isinstance(hook, hooks.LRScheduler))
        return [
            *default[:place],
            ValidationLoss(cfg.TEST.EVAL_PERIOD, lambda: build_validation_loader(cfg)),
            EarlyStopping(self.checkpointer, patience=stop.PATIENCE, min_delta=stop.MIN_DELTA),
            *default[place:],
        ]

    def train(self) -> None:
        with contextlib.suppress(StopTraining):
            super().train()


def setup(args: Namespace) -> CfgNode:
    """The config of the command line, frozen, with logging, seeds and the output folder set up.

    Raises:
        KeyError, ValueError: for keys that do not exist and datasets that are not registered.
    """
    cfg = get_cfg()
    add_kg_config(cfg)
    cfg.merge_from_file(args.config_file, allow_unsafe=False)
    cfg.merge_from_list(args.opts)
    if args.eval_only or args.resume and os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")):
        cfg.MODEL.KEYPOINT_GRAPH.BACKBONE_WEIGHTS = ""  # the checkpoint has them: nothing need be downloaded
    cfg.freeze()
    for key in ("TRAIN", "VALIDATION", "TEST"):
        register_files(cfg.DATASETS[key])
        for name in cfg.DATASETS[key]:
            if name not in MetadataCatalog.list():
                cells = [
                    known
                    for known in MetadataCatalog.list()
                    if MetadataCatalog.get(known).get("evaluator_type") == "cells"
                ]
                raise ValueError(
                    f"DATASETS.{key}: no dataset is called {name!r}; those of cells are {', '.join(cells)},"
                    " and any COCO file is called by its path, such as mine/train.json"
                )
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="kg_detectron")
    return cfg


def main(args: Namespace) -> None:
    cfg = setup(args)
    if not args.eval_only:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        trainer.train()
        return
    if not cfg.MODEL.WEIGHTS:
        raise ValueError("--eval-only needs the weights to evaluate: add MODEL.WEIGHTS FILE to the command")
    model = Trainer.build_model(cfg)
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    Trainer.test(cfg, model)
    comm.synchronize()


if __name__ == "__main__":
    arguments = default_argument_parser().parse_args()
    launch(
        main,
        arguments.num_gpus,
        num_machines=arguments.num_machines,
        machine_rank=arguments.machine_rank,
        dist_url=arguments.dist_url,
        args=(arguments,),
    )
