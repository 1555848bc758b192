"""The figures of `evaluation` as tables, a row a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Table:
    """A table of the page: a row a model, of texts that are ready to read."""

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]
    note: str = ""
    head: str = "model"


def metric_tables(figures: Mapping[str, Mapping]) -> list[Table]:
    """Tables of what `evaluation.evaluate` gave for each model, by its name; undefined figures are n/a."""
    first = next(iter(figures.values()))
    ious = list(first["paper"])
    tables = [
        _table(
            "The paper's figures (%)",
            {
                f"{label}@{iou}": ("paper", iou, key)
                for key, label in (("box_ap", "box AP"), ("mask_ap", "mask AP"), ("mean_mask_iou", "mean IoU"))
                for iou in ious
            },
            figures,
            "AP as under Terms, of boxes and of masks; mean IoU of the masks that mask AP counts as found.",
        ),
        _table(
            "COCO AP (%)",
            {
                f"{kind} {label}": ("coco", kind, key)
                for kind in ("box", "mask")
                for key, label in (("ap", "AP"), ("ap50", "AP50"), ("ap75", "AP75"))
            },
            figures,
            f"Mean over IoU 0.50:0.05:0.95, at most {first['coco']['max_detections']} detections an image.",
        ),
    ]
    columns = ("precision", "recall", "f1", "accuracy", "sq", "pq")
    counted = ", ".join(f"{name} from score {of['min_score']:.3g}" for name, of in figures.items() if of["has_scores"])
    counted = f"Counted: {counted or 'all'}."
    note = "One-to-one matching of masks; accuracy is TP / (TP + FP + FN), SQ and PQ segmentation and panoptic quality."
    for iou in ious:
        keys = {_LABELS.get(key, key): ("matching", iou, key) for key in columns}
        tables.append(_table(f"Instances at IoU {iou} (%)", keys, figures, f"{note} {counted}"))
    overall = {"DSB score": ("dsb", "score"), "AJI": ("aji",), "Dice of foreground": ("foreground_dice",)}
    note = f"DSB score: mean of TP / (TP + FP + FN) over images and IoU 0.50:0.05:0.95; AJI of Kumar et al. {counted}"
    tables.append(_table("Over thresholds and areas (%)", overall, figures, note))
    classified = {name: of["classes"] for name, of in figures.items() if "classes" in of}
    return [*tables, *_class_tables(classified, counted)] if classified else tables


def _class_tables(figures: Mapping[str, Mapping], counted: str) -> list[Table]:
    """Figures over classes, of each class, and the confusion matrix of each model."""
    columns = {"mPQ": "mpq", "mPQ+": "mpq_plus", "bPQ": "bpq", "mask AP@0.5": "mask_ap", "COCO mask AP": "coco_mask_ap"}
    columns |= {"F1 detection": "f1_detection", "type accuracy": "type_accuracy", "accuracy": "accuracy"}
    note = (
        "mPQ, bPQ as in PanNuke, mPQ+ as in CoNIC, F1 of detection and type accuracy as in HoVer-Net; accuracy of the"
    )
    note += f" pairs of masks with IoU above 0.5; APs are means over the classes. {counted}"
    tables = [_table("Over classes (%)", {label: (key,) for label, key in columns.items()}, figures, note)]
    columns = {"PQ": "pq", "SQ": "sq", "RQ": "rq", "PQ of images": "pq_image", "mask AP@0.5": "mask_ap"}
    columns |= {"COCO mask AP": "coco_mask_ap", "F1 type": "f1_type"}
    several = len(figures) > 1
    for_each = {
        f"{name}: {model}" if several else name: of["per_class"][name]
        for model, of in figures.items()
        for name in of["names"]
    }
    note = "PQ from the sums over all images (CoNIC), and as the mean over the images that have the class (PanNuke); F1"
    note += " type: HoVer-Net's F1 of classification."
    by_class = _table("By class (%)", {label: (key,) for label, key in columns.items()}, for_each, note)
    tables.append(replace(by_class, head="class"))
    for model, of in figures.items():
        rows = [[str(number) for number in row] for row in of["confusion"]]
        rows[-1][-1] = ""
        title = f"Confusion of classes: {model}"
        note = "Rows are true classes, columns predicted ones, of pairs of masks with IoU above 0.5."
        names = [*of["names"], "no cell"]
        tables.append(Table(title, [*of["names"], "missed"], list(zip(names, rows, strict=True)), note, "truth"))
    return tables


_LABELS = {"f1": "F1", "sq": "SQ", "pq": "PQ"}


def _table(title: str, columns: Mapping[str, tuple[str, ...]], figures: Mapping[str, Mapping], note: str) -> Table:
    rows = []
    for name, of in figures.items():
        values = []
        for path in columns.values():
            value: Any = of
            for key in path:
                value = value[key]
            values.append("n/a" if value is None else f"{100 * value:.2f}")
        rows.append((name, values))
    return Table(title, list(columns), rows, note)
