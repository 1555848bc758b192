"""The kinds of results that can be saved. A new one is a line in `EXPORTERS` and a module with its writer.

The table imports no writer: the command line reads its help texts from here, and must answer at once.
"""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from kg_detectron.export.result import Result


class Exporter(NamedTuple):
    """One kind of result.

    Attributes:
        ending: of its files, behind the name of the image.
        module: in `kg_detectron.export`. It has ``write(path, result)`` and, where one file can hold a whole stack,
            ``write_stack(path, results)``.
        text: what it is, for help texts.
        extra: the extra of the package that its writer needs.
        is_other_form: it says the same as another kind, for other programs; such a kind is not among those of ``all``.
    """

    ending: str
    module: str
    text: str
    extra: str = ""
    is_other_form: bool = False

    def write(self, path: Path, result: "Result") -> None:
        """Write the cells of one image, whole or not at all."""
        import_module(f"kg_detectron.export.{self.module}").write(path, result)

    def write_stack(self, path: Path, results: Sequence["Result"]) -> None:
        """Write the cells of all planes of a stack, whole or not at all."""
        import_module(f"kg_detectron.export.{self.module}").write_stack(path, results)


EXPORTERS = {
    "labels": Exporter("_labels.tif", "label_images", "label image, TIFF"),
    "overlay": Exporter("_overlay.png", "overlay", "outlines over the image, PNG"),
    "coco": Exporter("_coco.json", "coco_json", "COCO JSON"),
    "geojson": Exporter(".geojson", "geojson", "polygons for QuPath"),
    "roi": Exporter("_rois.zip", "imagej_rois", "regions for ImageJ's ROI Manager"),
    "csv": Exporter("_cells.csv", "measurements", "measurements"),
    "classes": Exporter("_classes.csv", "class_table", "class of each cell of the label image"),
    "ome-tiff": Exporter("_labels.ome.tif", "ome_tiff", "label pyramid, OME-TIFF", is_other_form=True),
    "zarr": Exporter("_labels.ome.zarr", "ome_zarr", "label pyramid, OME-Zarr", extra="zarr", is_other_form=True),
}
KINDS = tuple(kind for kind, exporter in EXPORTERS.items() if not exporter.is_other_form)
OTHER_KINDS = tuple(kind for kind, exporter in EXPORTERS.items() if exporter.is_other_form)
KINDS_OF_STACKS = ("labels", "geojson", "roi", "csv", "classes", "ome-tiff", "zarr")  # those with `write_stack`
KINDS_OF_LABELS = ("labels", "ome-tiff", "zarr")  # label images
KINDS_OF_OVERLAPS = ("coco", "csv")  # those whose cells may overlap
# Those of which a stack has one file, unless all are wanted by page, and those of them that have one a page besides.
KINDS_OF_WHOLE_STACKS = (*KINDS_OF_LABELS, "classes", "roi")
KINDS_OF_PAGES_TOO = ("roi",)


def fault_in_kinds(kinds: Sequence[str]) -> str | None:
    """What is wrong with a choice of kinds: none at all, or one that is not in `EXPORTERS`."""
    unknown = [kind for kind in kinds if kind not in EXPORTERS]
    if not unknown and kinds:
        return None
    return f"expected some of {', '.join(EXPORTERS)}, or all; got {', '.join(map(repr, unknown)) or 'none'}"


def result_files(folder: Path, stem: str, kinds: Sequence[str] = KINDS) -> dict[str, Path]:
    """The files that a result has, by kind.

    Raises:
        ValueError: for an unknown kind.
    """
    if fault := fault_in_kinds(kinds):
        raise ValueError(f"kinds: {fault}")
    return {kind: Path(folder) / (stem + EXPORTERS[kind].ending) for kind in kinds}
