"""The page from files: ground truth, predictions and images, as a user has them."""

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from kg_detectron.inference import load_model
from kg_detectron.inference.explanation import explain
from kg_detectron.inference.predictor import channel_of_page
from kg_detectron.io.cell_sets import ImageCells, image_name, read_cells, read_predictions
from kg_detectron.io.images import IMAGE_SUFFIXES, ImageChoiceError, only_page, open_image
from kg_detectron.io.setting import SettingError, check_score
from kg_detectron.metrics.scoring import evaluate_cells
from kg_detectron.report.comparison import compare
from kg_detectron.report.explanation_figure import draw_explanation
from kg_detectron.report.page import DETAILS, ExplainedPicture, write_page
from kg_detectron.report.tables import metric_tables


def report_dataset(
    ground_truth: str | Path,
    predictions: Mapping[str, str | Path],
    images: str | Path,
    output: str | Path,
    *,
    title: str | None = None,
    ious: Sequence[float] = (0.5, 0.7),
    score: float | None = None,
    details: int = DETAILS,
    explanations: Sequence[ExplainedPicture] = (),
    progress: bool = False,
) -> None:
    """Compare one or several models on one dataset, and write the page.

    Args:
        ground_truth: a COCO dataset or a folder of label images, see `io.annotations.read_cells`.
        predictions: by the names of the models, see `io.annotations.read_predictions`.
        images: folder of the images, at any depth, found by their names without ending.
        output: the HTML file; an existing one is replaced.
        title: of the page; by default the name of the ground truth.
        ious: of masks, thresholds of the figures; at the first one images are ranked and cells are marked.
        score: 0..1, from which on instances count and are shown; None chooses it for each model, see
            `comparison.compare`.
        details: number of images that come with outlines, see `page.write_page`.
        explanations: shown on the page as well.
        progress: show progress bars.

    Raises:
        FileNotFoundError, ValueError: as `read_predictions`, `compare` and `write_page` do; an image that is missing; a
            ``score`` out of range.
    """
    if not ious:
        raise SettingError("ious", "expected at least one, got none")
    check_score("score", score)
    truths = read_cells(ground_truth)
    found = {name: read_predictions(path, truths) for name, path in predictions.items()}
    files = find_images(images, truths)
    comparison = compare(truths, found, iou=ious[0], score=score, progress=progress)
    figures = {
        name: evaluate_cells(truths, own, ious=ious, min_score=least or 0.0)
        for (name, own), least in zip(found.items(), comparison.scores, strict=True)
    }
    named = [of["classes"]["names"] for of in figures.values() if "classes" in of]
    write_page(
        output,
        comparison,
        files,
        title=title or Path(ground_truth).stem,
        tables=metric_tables(figures),
        classes=list(dict.fromkeys(name for names in named for name in names)),
        explanations=explanations,
        details=details,
        progress=progress,
    )


def explain_image(
    model: str | Path,
    image: str | Path,
    device: str = "cpu",
    *,
    axes: str | None = None,
    channels: Sequence[int | str] | None = None,
    scene: int | str | None = None,
    ask: bool = True,
) -> ExplainedPicture:
    """A picture of how a model found its boxes in an image, see `inference.explanation.explain`.

    Args:
        model: file, see `inference.load_model`.
        image: file, see `io.images.read_image`.
        device: where the model runs.
        axes, channels, scene: what of the file is the image, see `io.images.open_image`.
        ask: whether a channel that has to be chosen is an error; without it, the one is taken that a prediction takes.

    Raises:
        FileNotFoundError, ValueError: a file is missing or not what it should be.
    """
    pages = open_image(image, axes=axes, channels=channels, scene=scene, ask=ask).pages
    page, network, name = only_page(pages, str(image)), load_model(model, device), Path(image).name
    taken = ""
    if not page.chosen:
        try:
            number, why = channel_of_page(network, page)
        except ImageChoiceError as error:
            raise error.of_file(str(image)) from None
        page, taken = page.of_channels((number,)), f" Of channel {page.channel_names[number - 1]}, {why}."
    pixels = np.ascontiguousarray(page.pixels)
    explained = explain(network, pixels)
    return ExplainedPicture(name, draw_explanation(pixels, explained, name), explained.summary() + taken)


def find_images(folder: str | Path, truths: Sequence[ImageCells]) -> dict[str, Path]:
    """The image files of the ground truth, by its names.

    Args:
        folder: of the images, at any depth. Its folders are those of the names, or else do not count.

    Raises:
        FileNotFoundError: an image is missing.
        ValueError: there are two files for an image.
    """
    folder = Path(folder)
    by_name: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith("."):
            name = image_name(file.relative_to(folder))
            for key in {name, PurePosixPath(name).name}:
                by_name.setdefault(key, []).append(file)
    found, missing = {}, []
    for truth in truths:
        files = by_name.get(truth.name) or by_name.get(PurePosixPath(truth.name).name)
        if not files:
            missing.append(truth.name)
        elif len(files) > 1:
            raise ValueError(f"{folder}: {files[0]} and {files[1]} are both called {truth.name}, expected one image")
        else:
            found[truth.name] = files[0]
    if missing:
        names = ", ".join(missing[:3]) + (", ..." if missing[3:] else "")
        raise FileNotFoundError(f"{folder}: {len(missing)} of {len(truths)} images are missing: {names}")
    return found


def model_names(paths: Sequence[str | Path]) -> list[str]:
    """Names that tell files or folders of predictions apart: their paths without what all of them share."""
    parts = [list(Path(path).with_suffix("").parts) for path in paths]
    if len(parts) > 1:
        for end in (-1, 0):
            while min(map(len, parts)) > 1 and len({own[end] for own in parts}) == 1:
                for own in parts:
                    del own[end]
        return ["/".join(own) for own in parts]
    return [own[-1] if own else "prediction" for own in parts]
