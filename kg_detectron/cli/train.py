"""``kg-detectron train``: adapt a model to labelled images, or train one anew, without Detectron2."""

import argparse
from typing import TYPE_CHECKING

from kg_detectron.inference.run_settings import check_device, check_output
from kg_detectron.io.setting import SettingError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kg_detectron.training.dataset import LabelledImage
    from kg_detectron.training.recipe import Recipe
    from kg_detectron.training.run import TrainSettings


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
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file with settings of the network, the training and the augmentation (docs/train.md); options of "
        "this command count more",
    )
    parser.add_argument(
        "--merge-categories",
        action="store_true",
        help="take the categories of a COCO JSON as one; by default the model learns to tell several apart",
    )
    parser.add_argument("--minutes", type=float, metavar="N", help="train for so long; default: 20")
    parser.add_argument("--iterations", type=int, metavar="N", help="train for so many iterations instead")
    parser.add_argument("--batch-size", type=int, metavar="N", help="windows of an iteration; default: 4")
    parser.add_argument("--learning-rate", type=float, metavar="R", help="default: 0.002")
    parser.add_argument("--seed", type=int, metavar="N", help="default: 0")
    parser.add_argument("--validations", type=int, metavar="N", help="how many during the run; default: 3")
    parser.add_argument(
        "--patience",
        type=int,
        metavar="N",
        help="stop after N validations in a row without a better one; default: never",
    )
    parser.add_argument(
        "--freeze",
        type=int,
        metavar="N",
        help="leave the layers behind the first N of the four maps of the backbone as they are: faster, and enough for "
        "a few images that resemble those of the model; default: 0",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: the GPU where there is one")
    parser.set_defaults(run=run)


# Options that are settings of the training, which a recipe may state too.
_SETTINGS = ("minutes", "iterations", "batch_size", "learning_rate", "seed", "validations", "patience", "freeze")


def train_settings(arguments: argparse.Namespace, recipe: "Recipe") -> "TrainSettings":
    """The settings of the training: those of the command line, else those of the recipe.

    Raises:
        ValueError: a name that does not exist, or a value of the recipe out of its range.
        SettingError: an option out of its range.
    """
    from kg_detectron.modeling.settings import from_plain
    from kg_detectron.training.run import TrainSettings

    given = {name: getattr(arguments, name) for name in _SETTINGS if getattr(arguments, name) is not None}
    values = dict(recipe.training)
    if "minutes" in given or "iterations" in given:
        values = {name: value for name, value in values.items() if name not in ("minutes", "iterations")}
    values |= given
    if values.get("iterations") is not None:
        values.setdefault("minutes", None)
    try:
        return from_plain(TrainSettings, values)
    except TypeError as error:  # of a recipe: text in the place of a number
        raise ValueError(f"training: {error}") from None
    except SettingError as error:
        if given.keys().isdisjoint(error.settings):
            raise ValueError(f"training: {error}") from None
        raise


def _cells_of_classes(names: "Sequence[str]", images: "Sequence[LabelledImage]") -> str:
    """What the training learns of each class; in words where it cannot."""
    from kg_detectron.training.dataset import cells_of_classes

    unknown, *counts = cells_of_classes(images, len(names))
    parts = [
        f"{name} {count}" if count else f"{name} none, so not learnt" for name, count in zip(names, counts, strict=True)
    ]
    return ", ".join(parts + ([f"{unknown} of no known class"] if unknown else []))


def run(arguments: argparse.Namespace) -> int:
    """Run the command; the result is the exit status."""
    if arguments.validation is not None and len(arguments.validation) > 2:
        raise SettingError(
            "validation", f"expected IMAGES MASKS, or a COCO JSON, got {len(arguments.validation)} names"
        )
    if arguments.minutes is not None and arguments.iterations is not None:
        raise ValueError("--minutes and --iterations: expected one of them")
    check_device(arguments.device)
    check_output(arguments.output)
    import torch

    from kg_detectron.training.dataset import dataset_classes, read_dataset
    from kg_detectron.training.recipe import Recipe, read_recipe
    from kg_detectron.training.run import IMAGENET, MODEL_FILE, NOTHING, split_validation, starting_model, train

    recipe = read_recipe(arguments.config) if arguments.config else Recipe()
    settings = train_settings(arguments, recipe)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    classes = () if arguments.merge_categories else dataset_classes(arguments.images)
    model = starting_model(arguments.model, device, recipe.network, classes)
    names = () if arguments.merge_categories or len(model.classes) < 2 else model.classes.names
    images = read_dataset(arguments.images, arguments.masks, model.preprocessing, arguments.layout, names)
    if arguments.validation is None:
        training, validation = split_validation(images, seed=settings.seed)
        shared = len(images) < 4
    else:
        first, *rest = arguments.validation
        validation = read_dataset(first, rest[0] if rest else None, model.preprocessing, arguments.layout, names)
        training, shared = images, False
    cells = sum(len(image.diameters) for image in training)
    print(f"{len(training)} images with {cells} cells to train on, {len(validation)} images to validate on")
    if names:
        print(f"cells of each class: {_cells_of_classes(names, training)}")
    if shared:
        print("note: fewer than four images, so they are used for both, and the figures say little")
    budget = f"{settings.minutes:g} minutes" if settings.minutes else f"{settings.iterations} iterations"
    print(f"training for {budget}, besides the time of a few validations and, where it gets one, of a confidence head")
    adapts = arguments.model not in (IMAGENET, NOTHING)
    figures = train(
        model,
        training,
        validation,
        arguments.output,
        settings,
        adapts=adapts,
        geometry=recipe.geometry,
        colours=recipe.colours,
    )
    if figures is None:
        return 130
    print(f"validation: {figures}")
    path = f"{arguments.output}/{MODEL_FILE}"
    print(f"{path}: use it with\n  kg-detectron predict IMAGES -m {path} -o OUT")
    return 0
