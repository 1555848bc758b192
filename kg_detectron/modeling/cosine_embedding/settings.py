"""Settings of CosineEmbedding (Payer et al., MICCAI 2018; Medical Image Analysis 57, 2019)."""

from dataclasses import dataclass
from typing import ClassVar

from kg_detectron.modeling.backbone import BackboneSettings
from kg_detectron.modeling.preprocessing import Preprocessing
from kg_detectron.modeling.settings import require
from kg_detectron.modeling.trunk import SCALES, TrunkSettings

FOREGROUND = ("median", "learned")
CLUSTERING = ("mean_shift", "hdbscan")


@dataclass(frozen=True)
class EmbeddingHeadSettings:
    """Settings of the head, and of its loss.

    Attributes:
        dimensions: of the embeddings.
        scale: decoder map that the head reads, of 1, 2, 3, 4 (strides 1, 2, 4, 8).
        foreground: how pixels of cells are told from the background: "median": their embedding is not the image's
            median, as published, which needs more background than cells; "learned": one more channel tells it. Ours.
        contrast_weight: of the term that keeps neighbours apart.
        neighbour_radius: cells that come within this distance of a cell's centroid are its neighbours; fraction of the
            input's width. Embeddings of others may be alike.
        max_cells: in training at most so many cells of an image, drawn at random, have a term in the loss; 0 takes all
            (published: 32).

    Raises:
        ValueError: a value out of its range.
    """

    NODE: ClassVar[str] = "MODEL.COSINE_EMBEDDING"

    dimensions: int = 16
    scale: int = 2
    foreground: str = "median"
    contrast_weight: float = 1.0
    neighbour_radius: float = 0.2
    max_cells: int = 0

    def __post_init__(self) -> None:
        require(self.dimensions >= 2, "dimensions", "2 or more", self.dimensions)
        require(self.scale in SCALES, "scale", f"one of {SCALES}", self.scale)
        require(self.foreground in FOREGROUND, "foreground", f"one of {', '.join(FOREGROUND)}", self.foreground)
        require(self.contrast_weight >= 0, "contrast_weight", "0 or more", self.contrast_weight)
        require(self.neighbour_radius > 0, "neighbour_radius", "a fraction above 0", self.neighbour_radius)
        require(self.max_cells >= 0, "max_cells", "0 or more", self.max_cells)


@dataclass(frozen=True)
class ClusteringSettings:
    """Settings of the way from embeddings to cells.

    Attributes:
        background_threshold: a pixel belongs to a cell where the squared cosine between its embedding and the median is
            below it; or, where that is learned, where the probability of the background is; between 0 and 1.
        clustering: "mean_shift", or "hdbscan", which needs scikit-learn.
        bandwidth: radius of the mean shift, distance of embeddings of unit length; 0.45 is a cosine of 0.9.
        seeds: pixels, evenly spread, at which the mean shift starts.
        coordinate_weight: the coordinates, in pixels, times this are further dimensions.
        min_area: smaller pieces of clusters are no cells; also the smallest cluster of HDBSCAN; pixels.

    Raises:
        ValueError: a value out of its range.
    """

    NODE: ClassVar[str] = "MODEL.COSINE_EMBEDDING"

    background_threshold: float = 0.5
    clustering: str = "mean_shift"
    bandwidth: float = 0.45
    seeds: int = 512
    coordinate_weight: float = 0.005
    min_area: int = 20

    def __post_init__(self) -> None:
        threshold = self.background_threshold
        require(0 < threshold < 1, "background_threshold", "a number between 0 and 1", threshold)
        require(self.clustering in CLUSTERING, "clustering", f"one of {', '.join(CLUSTERING)}", self.clustering)
        require(self.bandwidth > 0, "bandwidth", "a number above 0", self.bandwidth)
        require(self.seeds >= 1, "seeds", "1 or more", self.seeds)
        require(self.coordinate_weight >= 0, "coordinate_weight", "0 or more", self.coordinate_weight)
        require(self.min_area >= 1, "min_area", "1 or more pixels", self.min_area)


@dataclass(frozen=True)
class CosineEmbeddingSettings:
    """Settings of `CosineEmbeddingNet`, a dataclass for each part."""

    preprocessing: Preprocessing = Preprocessing()
    backbone: BackboneSettings = BackboneSettings()
    trunk: TrunkSettings = TrunkSettings()
    heads: EmbeddingHeadSettings = EmbeddingHeadSettings()
    decoding: ClusteringSettings = ClusteringSettings()
