#!/usr/bin/env python
"""Train or evaluate a model on cells: `train_net.py --config-file configs/kg_dsb2018.yaml --num-gpus 4`.

Runs the keypoint-graph model and Mask R-CNN alike, on one or several GPUs or machines, or on the CPU
(`MODEL.DEVICE cpu`). `--eval-only` evaluates `MODEL.WEIGHTS`, `--resume` continues from the last checkpoint of
`OUTPUT_DIR`, and further `KEY VALUE` pairs override the config.

A run depends on its config and `SEED` alone (on the CPU; GPUs round differently from run to run). Without one, a seed
is drawn and written to `OUTPUT_DIR/config.yaml`. Interrupted in any way and resumed, a run ends as it would have
without. SIGINT and SIGTERM end the iteration, save and exit with 130 and 143; a second one ends at once.

All datasets are checked before the training, and every fault is named; `--skip-bad` goes on without what is bad.

Configs and checkpoints are read as data. `--trust-pickle` lets those that hold code run it: Detectron2's own `.pkl`
weights, for example. MODEL.WEIGHTS that are a URL are downloaded where they stand on the command line.
"""

import contextlib
import os
import weakref
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from pathlib import Path

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, HookBase, default_argument_parser, default_setup, hooks, launch
from detectron2.evaluation import DatasetEvaluator
from detectron2.solver import get_default_optimizer_params
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from detectron2.utils.logger import setup_logger
from torch import nn

from kg_detectron.d2 import add_kg_config, register_files
from kg_detectron.d2.checkpointer import WholeCheckpointer
from kg_detectron.d2.config import merge_config
from kg_detectron.d2.data import build_test_loader, build_train_loader, build_validation_loader
from kg_detectron.d2.evaluators import build_evaluators
from kg_detectron.d2.hooks import EarlyStopping, FiniteLosses, Seeding, StopOnSignal, StopTraining, ValidationLoss
from kg_detectron.d2.modeling import ModelDescription
from kg_detectron.d2.solver import build_lr_scheduler
from kg_detectron.d2.training_check import check_datasets
from kg_detectron.d2.writers import build_writers

# Checkpoints that stay beside model_best.pth and model_final.pth.
CHECKPOINTS_TO_KEEP = 2


class Trainer(DefaultTrainer):
    """Detectron2's trainer with the data, optimiser, evaluation, checkpoints and hooks of this project."""

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = super().build_model(cfg)
        return model.to(memory_format=torch.channels_last) if cfg.MODEL.CHANNELS_LAST else model

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[list[dict]]:
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[list[dict]]:
        return build_test_loader(cfg, dataset_name)

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
        cfg = self.cfg
        # Detectron2's __init__ has just made its own checkpointer, and asks for the hooks, which take ours.
        self.checkpointer = WholeCheckpointer(self.model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        description = ModelDescription.of(cfg)
        if description is not None:
            self.checkpointer.add_checkpointable(ModelDescription.KEY, description)
        default = [hook for hook in super().build_hooks() if hook is not None]
        for hook in default:
            if isinstance(hook, hooks.PeriodicCheckpointer):
                hook.max_to_keep = CHECKPOINTS_TO_KEEP
        validation = []
        if cfg.DATASETS.VALIDATION:
            stop = cfg.SOLVER.EARLY_STOPPING
            validation = [
                ValidationLoss(cfg.TEST.EVAL_PERIOD, lambda: build_validation_loader(cfg)),
                EarlyStopping(self.checkpointer, patience=stop.PATIENCE, min_delta=stop.MIN_DELTA),
            ]
        kinds = [type(hook) for hook in default]
        stepped, evaluation = kinds.index(hooks.LRScheduler) + 1, kinds.index(hooks.EvalHook)
        return [
            Seeding(self.data_loader.sampler, cfg.SOLVER.IMS_PER_BATCH),
            FiniteLosses(),
            *default[:stepped],
            *validation,
            *default[stepped:evaluation],
            StopOnSignal(self.checkpointer),
            *default[evaluation:],
        ]

    def build_writers(self) -> list[EventWriter]:
        return []  # Detectron2 asks before it is known where a resumed run begins; `train` adds them

    def train(self) -> None:
        if comm.is_main_process():
            if not self.start_iter:
                self.checkpointer.forget_last_checkpoint()
            writers = build_writers(self.cfg.OUTPUT_DIR, self.start_iter, self.max_iter)
            self.register_hooks([hooks.PeriodicWriter(writers, period=20)])
        with contextlib.suppress(StopTraining):
            super().train()


def run_seed(cfg: CfgNode, resume: bool) -> int:
    """``cfg.SEED``, or that of the run that is resumed, or, where both say -1, one drawn for all processes."""
    seed, earlier = cfg.SEED, Path(cfg.OUTPUT_DIR, "config.yaml")
    if seed < 0 and resume and earlier.is_file():
        seed = CfgNode.load_yaml_with_base(str(earlier), allow_unsafe=False).get("SEED", -1)
    return comm.shared_random_seed() if seed < 0 else seed


def setup(args: Namespace) -> CfgNode:
    """The config of the command line, frozen, with logging, seeds and the output folder set up.

    Raises:
        KeyError, ValueError: for keys that do not exist, datasets that are not registered, what `merge_config` refuses,
            and what would be downloaded or run without having been asked for.
    """
    cfg = get_cfg()
    add_kg_config(cfg)
    merge_config(cfg, args.config_file)
    cfg.merge_from_list(args.opts)
    if "://" in cfg.MODEL.WEIGHTS and cfg.MODEL.WEIGHTS not in args.opts:
        raise ValueError(
            f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS} of {args.config_file} is not downloaded unless it stands on the"
            " command line too"
        )
    if cfg.MODEL.LOAD_PROPOSALS and not args.trust_pickle:
        raise ValueError("MODEL.LOAD_PROPOSALS: files of proposals are pickles, which can run code (--trust-pickle)")
    if args.eval_only or args.resume and os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")):
        cfg.MODEL.KEYPOINT_GRAPH.BACKBONE_WEIGHTS = ""  # the checkpoint has them: nothing need be downloaded
    cfg.SEED = run_seed(cfg, args.resume)
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
        names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.VALIDATION, *cfg.DATASETS.TEST]
        check_datasets(names, args.skip_bad, Path(cfg.OUTPUT_DIR, "without_bad"))
        trainer = Trainer(cfg)
        trainer.checkpointer.trust_pickle = args.trust_pickle
        trainer.resume_or_load(resume=args.resume)
        trainer.train()
        return
    if not cfg.MODEL.WEIGHTS:
        raise ValueError("--eval-only needs the weights to evaluate: add MODEL.WEIGHTS FILE to the command")
    model = Trainer.build_model(cfg)
    WholeCheckpointer(model, trust_pickle=args.trust_pickle).load(cfg.MODEL.WEIGHTS)
    Trainer.test(cfg, model)
    comm.synchronize()


def build_parser() -> ArgumentParser:
    parser = default_argument_parser()
    parser.add_argument(
        "--skip-bad", action="store_true", help="train without the images and cells that the check finds faulty"
    )
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="load checkpoints that can run code, such as Detectron2's .pkl weights; only if you trust their source",
    )
    return parser


if __name__ == "__main__":
    arguments = build_parser().parse_args()
    launch(
        main,
        arguments.num_gpus,
        num_machines=arguments.num_machines,
        machine_rank=arguments.machine_rank,
        dist_url=arguments.dist_url,
        args=(arguments,),
    )
