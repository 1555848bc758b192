"""A whole training: from labelled images to a model file with its threshold, on one machine, with PyTorch alone."""

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from kg_detectron.inference.model_file import load_model, save_model
from kg_detectron.io.atomic import replacing
from kg_detectron.io.checksum import array_sha256
from kg_detectron.io.setting import SettingError
from kg_detectron.io.stains import colours_of_dyes
from kg_detectron.modeling import InstanceNet, KeypointGraphNet, Scores, SegmentationSettings, method_class
from kg_detectron.modeling.backbone import may_be_pretrained
from kg_detectron.modeling.cell_size import common_diameter
from kg_detectron.modeling.classes import ClassBalance
from kg_detectron.modeling.cpu_layers import use_cpu_layers
from kg_detectron.modeling.settings import replaced
from kg_detectron.training.augmentation import ColourSettings, GeometrySettings
from kg_detectron.training.average import WeightAverage
from kg_detectron.training.confidence import RANKING, VIEWS, fit_confidence
from kg_detectron.training.dataset import LabelledImage, TrainingSamples, cells_of_classes
from kg_detectron.training.freezing import freeze
from kg_detectron.training.loop import LoopSettings, Trainer
from kg_detectron.training.sampler import EndlessSampler, balanced_weights
from kg_detectron.training.scalars import METRICS_FILE
from kg_detectron.training.schedule import CosineSchedule
from kg_detectron.training.validation import Validation, validate

MODEL_FILE = "model.safetensors"
SETTINGS_FILE = "train.json"
VALIDATION_FILE = "validation.jsonl"
# Cells of an image whose masks are trained in one iteration.
CELLS_PER_IMAGE = 48
# Images of a validation during the run; the last one takes all.
VALIDATION_IMAGES = 24
# Models to start from besides a file or a kept model.
IMAGENET, NOTHING = "imagenet", "nothing"


@dataclass(frozen=True)
class TrainSettings:
    """How a model is trained.

    Attributes:
        minutes: budget of time, of all stretches of a run together; validation is not counted.
        iterations: budget of iterations instead; a run is then exactly the same on every machine of one kind.
        batch_size: windows of an iteration.
        learning_rate: highest rate of AdamW.
        weight_decay: of AdamW.
        average_decay: of the moving average of the weights, which is what is kept.
        seed: of the run, 0 or more.
        validations: how many during the run, evenly spread; the ones before its first iteration and at its end come on
            top.
        patience: the run ends after so many validations in a row that are not the best so far; 0 is never.
        freeze: the layers behind so many maps of the backbone stay as they are, see `freeze`.
        confidence: what the confidence head sees that a keypoint graph without one gets at the end, where it does
            better with it on the validation images; "" leaves it without. See `SegmentationSettings`.

    Raises:
        SettingError: a value out of its range, or not just one budget.
    """

    minutes: float | None = 20.0
    iterations: int | None = None
    batch_size: int = 4
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    average_decay: float = 0.995
    seed: int = 0
    validations: int = 3
    patience: int = 0
    freeze: int = 0
    confidence: str = "context"

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.iterations is None):
            raise SettingError(("minutes", "iterations"), "expected one of the two budgets")
        for name in ("minutes", "iterations", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise SettingError(name, f"expected a number above 0, got {value}")
        if self.batch_size < 1:
            raise SettingError("batch_size", f"expected 1 or more, got {self.batch_size}")
        for name in ("seed", "validations", "patience"):
            if getattr(self, name) < 0:
                raise SettingError(name, f"expected 0 or more, got {getattr(self, name)}")
        if not 0 <= self.freeze <= 4:
            raise SettingError("freeze", f"expected a number of 0..4, got {self.freeze}")
        SegmentationSettings(confidence=self.confidence)  # which checks it


def starting_model(
    start: str, device: str = "cpu", changes: Mapping[str, Any] | None = None, classes: Sequence[str] = ()
) -> InstanceNet:
    """The network that a training begins with.

    Args:
        start: a kept model's name, a model file, "imagenet" for the network of the kept models with ImageNet weights in
            its backbone, or "nothing" for random weights.
        changes: of its method and settings, see `Recipe.network`. A trained model must still fit; a confidence head
            that it lacks begins anew.
        classes: of the data. Where there are several, and the model does not know all of them, it gets a new class
            head for these; all other weights stay.

    Raises:
        FileNotFoundError, ValueError: as `load_model` does; changes that do not exist, or that the weights do not fit;
            several classes for a method that tells none apart.
        ModuleNotFoundError: the package of the ImageNet weights is not installed.
    """
    model = load_model(device=device) if start in (IMAGENET, NOTHING) else load_model(start, device)
    changes = dict(changes or {})
    method = changes.pop("method", model.method)
    settings = model.settings if method == model.method else method_class(method).Settings()
    settings = replaced(settings, changes)
    if len(classes) > 1:
        settings = _with_classes(settings, method, classes)
    if start in (IMAGENET, NOTHING):
        if hasattr(settings, "backbone"):
            weights = (settings.backbone.backbone_weights or "IMAGENET1K") if start == IMAGENET else ""
            backbone = dataclasses.replace(settings.backbone, backbone_weights=weights)
            settings = dataclasses.replace(settings, backbone=backbone)
        return method_class(method).build(settings).to(device)
    return model if settings == model.settings else _rebuilt(model, method, settings, start)


def _rebuilt(model: InstanceNet, method: str, settings: Any, name: str) -> InstanceNet:
    """A network of other settings with the weights of a model, which is called so in errors; new heads begin anew."""
    changed = method_class(method).build(settings).to(model.place.device)
    known, new = model.state_dict(), changed.state_dict()

    def begins_anew(name: str) -> bool:
        other_classes = changed.classes.names != model.classes.names and changed.of_classes(name)
        return other_classes or (changed.of_confidence(name) and not (name in known and name in new))

    weights = {name: value for name, value in known.items() if not begins_anew(name)}
    weights |= {name: value for name, value in new.items() if begins_anew(name)}
    try:
        changed.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"{name}: its weights do not fit the network with these settings; start from {IMAGENET} or {NOTHING}: "
            f"{str(error).splitlines()[1].strip()}"
        ) from None
    changed.scores = model.scores
    return changed


def _with_classes(settings: Any, method: str, classes: Sequence[str]) -> Any:
    """Settings of a network of these classes, where it does not know them all."""
    known = getattr(settings, "classes", None)
    if known is None:
        raise ValueError(
            f"method {method} tells no classes apart, and the data have {len(classes)}: {', '.join(classes)}; "
            "--merge-categories takes them as one"
        )
    if set(classes) <= set(known.names):
        return settings
    changed = dataclasses.replace(known, names=tuple(classes), colours=(), cells_of_class=())
    return dataclasses.replace(settings, classes=changed)


def balance_classes(model: InstanceNet, images: Sequence[LabelledImage]) -> None:
    """Note the cells of each class of the training data in the model, in place; its class loss is balanced by them."""
    if len(model.classes) < 2:
        return
    _, *counts = cells_of_classes(images, len(model.classes))
    if any(counts):
        classes = dataclasses.replace(model.classes, cells_of_class=tuple(counts))
        model.settings = dataclasses.replace(model.settings, classes=classes)
        for module in model.modules():
            if isinstance(module, ClassBalance):
                module.use(classes)


def split_validation(
    images: Sequence[LabelledImage], share: float = 0.2, seed: int = 0
) -> tuple[list[LabelledImage], list[LabelledImage]]:
    """Split labelled images at random into those to train on and those to validate on.

    Fewer than four images are all used for both, for none can be spared.
    """
    if len(images) < 4:
        return list(images), list(images)
    order = np.random.RandomState(seed).permutation(len(images))
    count = max(1, round(share * len(images)))
    held = set(order[:count].tolist())
    return [i for n, i in enumerate(images) if n not in held], [i for n, i in enumerate(images) if n in held]


def parameter_groups(model: InstanceNet, learning_rate: float, weight_decay: float) -> list[dict]:
    """Groups for an optimiser: the backbone learns at its own factor; biases and norm layers do not decay."""
    factor = getattr(getattr(model.settings, "backbone", None), "backbone_lr_factor", 1.0)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        pretrained = may_be_pretrained(name)
        groups.setdefault((pretrained, parameter.dim() > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * (factor if pretrained else 1.0),
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (pretrained, decays), parameters in groups.items()
    ]


def train(
    model: InstanceNet,
    training: Sequence[LabelledImage],
    validation: Sequence[LabelledImage],
    folder: str | Path,
    settings: TrainSettings | None = None,
    *,
    adapts: bool = False,
    geometry: GeometrySettings | None = None,
    colours: ColourSettings | None = None,
    log: Callable[[str], None] = tqdm.write,
) -> Validation | None:
    """Train a model, and keep the best of its validations as ``model.safetensors`` in a folder.

    A run that was stopped, by Ctrl-C or a signal, goes on exactly where it was when it is called again with the same
    arguments.

    Args:
        model: to train, in place.
        training: labelled images to learn from.
        validation: those to choose the weights and the threshold by.
        folder: of the run, made where absent.
        settings: budget and optimiser.
        adapts: the model is trained already, and has to get better to be kept.
        geometry: augmentation of places and sizes.
        colours: augmentation of grey levels and colours.
        log: gets a line for every validation.

    Returns:
        The figures of the kept model, or None where the run was stopped.

    Raises:
        ValueError: there is no cell to learn from, or the folder holds a run of other images, of other settings
            or of another model.
    """
    settings, folder = settings or TrainSettings(), Path(folder)
    if not sum(len(image.diameters) for image in training):
        raise ValueError("images: expected at least one labelled cell to train on, got none")
    if model.preprocessing.resize != "isotropic":
        model.with_preprocessing(resize="isotropic")
        log("the model now scales images by the size of their cells, no longer to one size")
    if model.preprocessing.single_colours and any(colours_of_dyes(i.image) for i in training):
        model.with_preprocessing(single_colours=False)
        log("pictures of several dyes are shown to the model in all their colours, as here in training")
    folder.mkdir(parents=True, exist_ok=True)
    geometry, colours = geometry or GeometrySettings(), colours or ColourSettings()
    balance_classes(model, training)
    parts: dict[str, Any] = {"settings": settings, "geometry": geometry, "colours": colours}
    content: dict[str, Any] = {name: dataclasses.asdict(part) for name, part in parts.items()}
    content["images"] = {"training": _checksum(training), "validation": _checksum(validation)}
    _check_folder(folder, content | {"model": model.description()})
    torch.manual_seed(settings.seed)
    segmentation: Any = getattr(model, "segmentation", None)
    if segmentation is not None:
        segmentation.settings = dataclasses.replace(segmentation.settings, cells_per_image=CELLS_PER_IMAGE)
    use_cpu_layers(model)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # PyTorch's overloads lack it
    freeze(model, settings.freeze)
    kinds = [image.kind for image in training]
    trainer = Trainer(
        model,
        lambda images, targets: model(_on(images, model.place), [_target_on(t, model.place) for t in targets]),
        torch.optim.AdamW(parameter_groups(model, settings.learning_rate, settings.weight_decay)),
        TrainingSamples(training, model.preprocessing.diameter, geometry, colours),
        EndlessSampler(len(training), settings.seed, weights=balanced_weights(kinds)),
        folder,
        LoopSettings(settings.iterations, settings.minutes, settings.batch_size, settings.seed),
        CosineSchedule(),
        WeightAverage(model, settings.average_decay),
    )
    resumed = trainer.resume()
    keeper = _Keeper(model, trainer, _some(validation, VALIDATION_IMAGES), folder, log)
    if not resumed and adapts:
        keeper.validate()
    finished = resumed and keeper.out_of_patience(settings.patience)
    if not finished:
        with tqdm(total=100, desc="training", unit="%", bar_format=_BAR) as bar:

            def after_iteration(_: Trainer) -> None:
                bar.set_postfix_str(f"iteration {trainer.iteration}, loss {trainer.latest.get('loss', 0):.3f}")
                bar.n = 100 * min(1.0, trainer.progress)  # the last iteration ends after the time is over
                bar.update(0)
                if trainer.progress < 1 and trainer.progress >= (keeper.done + 1) / (settings.validations + 1):
                    keeper.validate()
                    trainer.stop_requested |= keeper.out_of_patience(settings.patience)

            finished = trainer.train(after_iteration) or keeper.out_of_patience(settings.patience)
    if not finished:
        trainer.log.close()
        log(f"stopped after iteration {trainer.iteration}; give the same command again to go on")
        return None
    if keeper.out_of_patience(settings.patience):
        log(f"no better over {settings.patience} validations: the training ends after iteration {trainer.iteration}")
    elif keeper.last_iteration != trainer.iteration:
        keeper.validate()
    trainer.log.close()
    return keeper.finish(validation, training, settings)


_BAR = "{desc}: {n:.1f} % |{bar}| {elapsed}<{remaining} {postfix}"


class _Keeper:
    """Validates the averaged weights now and then, and keeps the best."""

    def __init__(
        self,
        model: InstanceNet,
        trainer: Trainer,
        images: Sequence[LabelledImage],
        folder: Path,
        log: Callable[[str], None],
    ) -> None:
        self.model, self.trainer, self.images, self.folder, self.log = model, trainer, images, folder, log
        self.file = folder / VALIDATION_FILE
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() and trainer.iteration else []
        self.records = [json.loads(line) for line in lines]

    @property
    def done(self) -> int:
        """Validations during the run; one before its first iteration does not count."""
        return sum(record["iteration"] > 0 for record in self.records)

    @property
    def last_iteration(self) -> int | None:
        """Iteration of the last validation."""
        return self.records[-1]["iteration"] if self.records else None

    def out_of_patience(self, patience: int) -> bool:
        """Whether so many last validations have not been better than the best one before; never for 0."""
        values = [record["value"] for record in self.records]
        return bool(patience and values) and len(values) - 1 - int(np.argmax(values)) >= patience

    def validate(self) -> None:
        """Validate the averaged weights; keep them where they are the best so far."""
        average = self.trainer.average
        assert average is not None
        with average.applied(self.model):
            figures = validate(self.model, self.images, true_scale=True)
            best = max((record["value"] for record in self.records), default=-1.0)
            value = _value(figures)
            record = {
                "iteration": self.trainer.iteration,
                "minutes": round(self.trainer.seconds / 60, 2),
                "value": value,
                "f1": figures.f1,
                **{f"mask_ap_{iou}": ap for iou, ap in figures.mask_ap.items()},
            }
            if figures.class_accuracy is not None:
                record["class_accuracy"] = figures.class_accuracy
            self.records.append(record)
            with replacing(self.file) as unfinished:
                unfinished.write_text("".join(json.dumps(r) + "\n" for r in self.records), encoding="utf-8")
            shown = {f"validation/{name}": record[name] for name in record if name not in ("iteration", "minutes")}
            self.trainer.log.show(self.trainer.iteration, shown)
            self.log(f"iteration {record['iteration']}, {record['minutes']:.1f} minutes: {figures}")
            if value > best:
                save_model(self.model, self.folder / MODEL_FILE)

    def finish(
        self, validation: Sequence[LabelledImage], training: Sequence[LabelledImage], settings: TrainSettings
    ) -> Validation:
        """Load the best weights, fit their confidence head, calibrate them on all validation images, and write the
        model file.

        Calibrated twice: where the scale is the true one, so that the scale can be estimated as in a prediction, and
        where it is so.
        """
        best = load_model(self.folder / MODEL_FILE, self.model.place.device)
        best.with_preprocessing(
            diameters=cell_diameters(training, best.preprocessing.diameter),
            image_diameter=common_diameter([image.diameter for image in training if image.diameter]),
        )
        candidates = self._with_heads(best, training, settings)
        results = [(self._calibrated(model, validation), model) for model in candidates]
        if len(results) > 1:
            self.log("without a confidence head, and with one: " + "; ".join(str(figures) for figures, _ in results))
        figures, best = max(results, key=lambda result: _value(result[0]))  # of equal ones the first
        save_model(best, self.folder / MODEL_FILE)
        plot_curves(self.folder, self.records)
        return figures

    def _with_heads(
        self, model: InstanceNet, training: Sequence[LabelledImage], settings: TrainSettings
    ) -> list[InstanceNet]:
        """The model with its confidence head fitted; one without comes as it is, and with a new one."""
        models, sees = [model], settings.confidence
        if not isinstance(model, KeypointGraphNet):
            return models
        if not model.settings.segmentation.confidence:
            if not sees:
                return models
            changed = replaced(model.settings, {"segmentation": {"confidence": sees}, "ranking": RANKING})
            models.append(_rebuilt(model, model.method, changed, MODEL_FILE))
        # Of a short training the fit takes a part only.
        views = min(VIEWS, max(1, self.trainer.iteration * settings.batch_size // 2))
        boxes = fit_confidence(models[-1], training, settings.seed, views)
        self.log(f"a confidence head was fitted to {boxes} boxes that were found in the training images")
        return models

    def _calibrated(self, model: InstanceNet, validation: Sequence[LabelledImage]) -> Validation:
        """Calibrate the scores, in place; the figures of a prediction with no option."""
        model.scores = Scores()
        with contextlib.suppress(ValueError):  # which the next says
            model.scores, _ = validate(model, validation, true_scale=True).calibration()
        figures = validate(model, validation)
        try:
            model.scores, quality = figures.calibration()
            self.log(f"expected calibration error {quality.expected_error:.3f}, threshold {model.threshold:.3f}")
        except ValueError as error:
            model.scores = Scores()
            self.log(f"scores are not calibrated: {error}")
        return figures


def _value(figures: Validation) -> float:
    """What weights are chosen by: mask AP, F1, and where there are classes their accuracy."""
    value = float(np.nan_to_num(list(figures.mask_ap.values())).mean() + np.nan_to_num(figures.f1))
    return value + (figures.class_accuracy or 0.0)


def cell_diameters(images: Sequence[LabelledImage], diameter: float) -> tuple[float, ...]:
    """Diameters of the cells in the network's input, pixels, at the percentiles 5, 25, 50, 75 and 95."""
    parts = [i.diameters * diameter / i.diameter for i in images if i.diameter]
    return tuple(round(float(v), 1) for v in np.percentile(np.concatenate(parts), (5, 25, 50, 75, 95)))


def plot_curves(folder: Path, records: Sequence[dict]) -> None:
    """Draw losses and validation figures of a run into ``curves.png``."""
    from matplotlib.figure import Figure

    file = folder / METRICS_FILE  # not there after fewer iterations than it has for a line
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    lines = [json.loads(line) for line in text.splitlines()]
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    losses, figures = figure.subplots(1, 2)
    for name in [key for key in lines[0] if key.startswith("loss")] if lines else []:
        losses.plot([line["minutes"] for line in lines], [line[name] for line in lines], label=name)
    for name in ("mask_ap_0.5", "mask_ap_0.7", "f1"):
        figures.plot([r["minutes"] for r in records], [r[name] for r in records], marker="o", label=name)
    for axes, title in ((losses, "training losses"), (figures, "validation")):
        axes.set(xlabel="minutes", title=title)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    if losses.lines:
        losses.set_yscale("log")
    with replacing(folder / "curves.png") as unfinished:
        figure.savefig(unfinished, format="png", dpi=120)


def _checksum(images: Sequence[LabelledImage]) -> str:
    """SHA-256 of the pixels, labels and classes of images, in their order. Their names do not count."""
    parts = (part for image in images for part in (image.image, image.labels, image.classes) if part is not None)
    return hashlib.sha256("".join(map(array_sha256, parts)).encode()).hexdigest()


def _check_folder(folder: Path, content: dict[str, Any]) -> None:
    """Refuse a folder with a run of other settings, images or another model; note these in it.

    Args:
        folder: of the run.
        content: what the run depends on, a dict for each kind.
    """
    file = folder / SETTINGS_FILE
    content = json.loads(json.dumps(content))
    if file.exists() and (folder / "checkpoint.pth").exists():
        known = json.loads(file.read_text(encoding="utf-8"))
        changed = [
            f"{'another' if key == 'model' else 'other'} {key}"
            for key, values in content.items()
            if _differ(known.get(key, {}), values)
        ]
        if changed:
            raise ValueError(f"{folder} holds a run of {' and '.join(changed)}; choose another folder")
        return
    with replacing(file) as unfinished:
        unfinished.write_text(json.dumps(content | {"started": time.strftime("%F %T")}, indent=2), encoding="utf-8")


def _differ(known: Any, values: Any) -> bool:
    """Whether settings are others than those of a run; what an earlier version did not note is not compared."""
    if isinstance(known, dict) and isinstance(values, dict):
        return any(_differ(known[name], value) for name, value in values.items() if name in known)
    return known != values


def _some(images: Sequence[LabelledImage], count: int) -> list[LabelledImage]:
    """At most so many images, evenly from all kinds and sizes."""
    order = sorted(images, key=lambda image: (image.kind, image.image.shape[0], image.name))
    places = np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int))
    return [order[i] for i in places]


def _on(images: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    return [image.to(like.device) for image in images]


def _target_on(target: dict[str, Tensor], like: Tensor) -> dict[str, Tensor]:
    return {name: value.to(like.device) for name, value in target.items()}
