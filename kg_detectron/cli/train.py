"""``kg-detectron train``: adapt a model to labelled images, or train one anew, without Detectron2."""

import argparse


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to a parser."""
    parser = commands.add_parser(
        "train",
        help="train a model on your labelled images",
        description="Adapt a model to labelled images, or train one from ImageNet weights, and write it with its "
        "threshold. Give the same command again to go on with a run that was stopped.",
        epilog="example: kg-detectron train images masks -o run --minutes 20; then "
        "kg-detectron predict new_images -m run/model.safetensors -o cells",
    )
    parser.add_argument("images", metavar="IMAGES", help="folder of images, or a COCO JSON")
    parser.add_argument(
        "masks", metavar="MASKS", nargs="?", help="folder of their masks: label images, or files of cells"
    )
    parser.add_argument("-o", "--output", required=True, metavar="RUN", help="folder of the run, made where absent")
    parser.add_argument(
        "-m",
        "--model",
        default="nuclei",
        help="model to start from: a kept model's name, a file, 'imagenet' (its network with ImageNet weights in the "
        "backbone) or 'nothing' (random weights); default: nuclei",
    )
    parser.add_argument(
        "--validation",
        nargs="+",
        metavar=("IMAGES", "MASKS"),
        help="labelled images to choose and calibrate the model on; default: a fifth of the images, drawn at random",
    )
    parser.add_argument("--layout", choices=("labels", "cells"), help="of the masks; default: what is there")
    parser.add_argument("--minutes", type=float, metavar="N", help="train for so long; default: 20")
    parser.add_argument("--iterations", type=int, metavar="N", help="train for so many iterations instead")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="windows of an iteration; default: 4")
    parser.add_argument("--learning-rate", type=float, metavar="R", help="default: 0.0003 from a model, else 0.001")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: the GPU where there is one")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; the result is the exit status."""
    if arguments.validation is not None and len(arguments.validation) > 2:
        raise ValueError(f"--validation: expected IMAGES MASKS, or a COCO JSON, got {len(arguments.validation)} names")
    if arguments.minutes is not None and arguments.iterations is not None:
        raise ValueError("--minutes and --iterations: expected one of them")
    import torch

    from kg_detectron.training.dataset import read_dataset
    from kg_detectron.training.run import (
        IMAGENET,
        MODEL_FILE,
        NOTHING,
        TrainSettings,
        split_validation,
        starting_model,
        train,
    )

    settings = TrainSettings(
        minutes=None if arguments.iterations else (20.0 if arguments.minutes is None else arguments.minutes),
        iterations=arguments.iterations,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
    )
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = starting_model(arguments.model, device)
    images = read_dataset(arguments.images, arguments.masks, model.preprocessing, arguments.layout)
    if arguments.validation is None:
        training, validation = split_validation(images, seed=arguments.seed)
        shared = len(images) < 4
    else:
        first, *rest = arguments.validation
        validation = read_dataset(first, rest[0] if rest else None, model.preprocessing, arguments.layout)
        training, shared = images, False
    cells = sum(len(image.diameters) for image in training)
    print(f"{len(training)} images with {cells} cells to train on, {len(validation)} images to validate on")
    if shared:
        print("note: fewer than four images, so they are used for both, and the figures say little")
    budget = f"{settings.minutes:g} minutes" if settings.minutes else f"{settings.iterations} iterations"
    print(f"training for {budget}, besides the time of a few validations")
    adapts = arguments.model not in (IMAGENET, NOTHING)
    figures = train(model, training, validation, arguments.output, settings, adapts=adapts)
    if figures is None:
        return 130
    print(f"validation: {figures}")
    path = f"{arguments.output}/{MODEL_FILE}"
    print(f"{path}: use it with\n  kg-detectron predict IMAGES -m {path} -o OUT")
    return 0
