#!/usr/bin/env python
"""Train or evaluate a model on cells: `train_net.py --config-file configs/kg_dsb2018.yaml --num-gpus 4`.

Runs the keypoint-graph model and Mask R-CNN alike, on one or several GPUs or machines, or on the CPU
(`MODEL.DEVICE cpu`), where `--num-gpus 4` is four processes. torchrun may start them instead. `--eval-only` evaluates
`MODEL.WEIGHTS`, `--resume` continues from the last checkpoint of `OUTPUT_DIR`, and further `KEY VALUE` pairs override
the config. Results go to `output/<name of the config>`, unless `OUTPUT_DIR` says otherwise. A mistake in any of these
ends the program with one sentence and status 2.

A run depends on its config and `SEED` alone (on the CPU; GPUs round differently from run to run). Without one, a seed
is drawn and written to `OUTPUT_DIR/config.yaml`. Interrupted in any way and resumed, a run ends as it would have
without. SIGINT and SIGTERM end the iteration, save and exit with 130 and 143; a second one ends at once.

All datasets are checked before the training, and every fault is named; `--skip-bad` goes on without what is bad.

Configs and checkpoints are read as data. `--trust-pickle` lets those that hold code run it: Detectron2's own `.pkl`
weights, for example. MODEL.WEIGHTS that are a URL are downloaded where they stand on the command line.
"""

import importlib.util
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn

if importlib.util.find_spec("detectron2") is None:
    print(
        "train_net.py: error: Detectron2 is not installed; `make setup` installs it, `kg-detectron train` needs none",
        file=sys.stderr,
    )
    sys.exit(2)

from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from kg_detectron.d2 import add_kg_config, register_files
from kg_detectron.d2.checkpointer import WholeCheckpointer
from kg_detectron.d2.classes import classes_from_datasets
from kg_detectron.d2.config import drop_initial_weights, merge_config
from kg_detectron.d2.launch import AUTO, ProcessError, launch
from kg_detectron.d2.trainer import Trainer
from kg_detectron.d2.training_check import check_datasets
from kg_detectron.io.normalisation import Normalisation

# What users' mistakes raise before the training begins.
MISTAKES = (OSError, ValueError, KeyError)


def run_seed(cfg: CfgNode, resume: bool) -> int:
    """``cfg.SEED``, or that of the run that is resumed, or, where both say -1, one drawn for all processes."""
    seed, earlier = cfg.SEED, Path(cfg.OUTPUT_DIR, "config.yaml")
    if seed < 0 and resume and earlier.is_file():
        seed = CfgNode.load_yaml_with_base(str(earlier), allow_unsafe=False).get("SEED", -1)
    return comm.shared_random_seed() if seed < 0 else seed


def read_config(args: Namespace) -> CfgNode:
    """The config of the command line.

    Raises:
        KeyError, ValueError: for keys that do not exist, and what `merge_config` refuses.
    """
    cfg = get_cfg()
    add_kg_config(cfg)
    if not args.config_file:
        raise ValueError("--config-file: expected a config, such as configs/kg_dsb2018.yaml")
    cfg.OUTPUT_DIR = os.path.join("output", Path(args.config_file).stem)
    merge_config(cfg, args.config_file)
    try:
        cfg.merge_from_list(args.opts)
    except AssertionError as error:  # as Detectron2's config says it
        raise ValueError(f"KEY VALUE: {error}") from error
    return cfg


def setup(args: Namespace) -> CfgNode:
    """The config of the command line, frozen, with logging, seeds, the output folder and the data's classes set up.

    Raises:
        KeyError, ValueError: see `read_config`; for datasets that are not registered, and what would be downloaded or
            run without having been asked for.
    """
    cfg = read_config(args)
    if "://" in cfg.MODEL.WEIGHTS and cfg.MODEL.WEIGHTS not in args.opts:
        raise ValueError(
            f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS} of {args.config_file} is not downloaded unless it stands on the"
            " command line too"
        )
    if cfg.MODEL.LOAD_PROPOSALS and not args.trust_pickle:
        raise ValueError("MODEL.LOAD_PROPOSALS: files of proposals are pickles, which can run code (--trust-pickle)")
    if args.eval_only or args.resume and os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")):
        drop_initial_weights(cfg)  # the checkpoint has them: nothing need be downloaded
    cfg.SEED = run_seed(cfg, args.resume)
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
    classes_from_datasets(cfg)
    cfg.freeze()
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="kg_detectron")
    return cfg


def prepare(args: Namespace) -> Callable[[], object]:
    """Everything that can fail for a mistake of the user's, and what is left: the training, or the evaluation.

    Raises:
        OSError, KeyError, ValueError: see `setup`; and data or weights that are missing, faulty or do not fit.
    """
    cfg = setup(args)
    if not args.eval_only:
        names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.VALIDATION, *cfg.DATASETS.TEST]
        normalisation = Normalisation(cfg.INPUT.NORMALISATION, tuple(cfg.INPUT.PERCENTILES))
        check_datasets(names, args.skip_bad, Path(cfg.OUTPUT_DIR, "without_bad"), normalisation)
        trainer = Trainer(cfg)
        trainer.checkpointer.trust_pickle = args.trust_pickle
        trainer.resume_or_load(resume=args.resume)
        return trainer.train
    if not cfg.MODEL.WEIGHTS:
        raise ValueError("--eval-only needs the weights to evaluate: add MODEL.WEIGHTS FILE to the command")
    model = Trainer.build_model(cfg)
    WholeCheckpointer(model, trust_pickle=args.trust_pickle, complete=True).load(cfg.MODEL.WEIGHTS)
    return partial(evaluate, cfg, model)


def evaluate(cfg: CfgNode, model: nn.Module) -> None:
    """Evaluate a model in all processes."""
    Trainer.test(cfg, model)
    comm.synchronize()


def main(args: Namespace) -> None:
    """Train or evaluate, in each of the processes."""
    prepare(args)()


def run(args: Namespace) -> None:
    """As `main`, with one sentence for a user's mistake.

    Raises:
        SystemExit: with status 2, for a mistake.
    """
    try:
        work = prepare(args)
    except MISTAKES as error:
        if comm.get_world_size() == 1 or comm.get_local_rank() == 0:  # once on every machine
            print(f"train_net.py: error: {_sentence(error)}", file=sys.stderr)
        sys.exit(2)
    work()


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)


def build_parser() -> ArgumentParser:
    parser = default_argument_parser()
    # Detectron2's default is a port that two trainings of one user would share.
    parser.set_defaults(dist_url=AUTO)
    parser.add_argument(
        "--skip-bad", action="store_true", help="train without the images and cells that the check finds faulty"
    )
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="load checkpoints that can run code, such as Detectron2's .pkl weights; only if you trust their source",
    )
    return parser


def start(arguments: Namespace) -> int:
    """Run the program in as many processes as asked for; the result is its exit status."""
    try:
        device = read_config(arguments).MODEL.DEVICE
    except MISTAKES as error:
        print(f"train_net.py: error: {_sentence(error)}", file=sys.stderr)
        return 2
    try:
        launch(
            run,
            device,
            processes=max(1, arguments.num_gpus),  # 0 is the CPU, as elsewhere in Detectron2
            machines=arguments.num_machines,
            machine_rank=arguments.machine_rank,
            url=arguments.dist_url,
            args=(arguments,),
        )
    except ProcessError as error:
        print(f"train_net.py: error: {error}", file=sys.stderr)
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(start(build_parser().parse_args()))
