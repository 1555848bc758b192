"""CosineEmbedding: pixels of one cell have one direction, cells beside it have others (Payer et al. 2018)."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from kg_detectron.cells import Cells
from kg_detectron.modeling.cosine_embedding.decoding import decode_embedding
from kg_detectron.modeling.cosine_embedding.losses import embedding_loss
from kg_detectron.modeling.cosine_embedding.settings import CosineEmbeddingSettings
from kg_detectron.modeling.label_maps import label_maps
from kg_detectron.modeling.methods import register_method
from kg_detectron.modeling.precision import full_precision
from kg_detectron.modeling.trunk import convolution
from kg_detectron.modeling.trunk_net import TrunkNet


@register_method("cosine_embedding")
class CosineEmbeddingNet(TrunkNet):
    """CosineEmbedding on the shared backbone and trunk."""

    Settings: ClassVar[type] = CosineEmbeddingSettings

    def __init__(self, settings: CosineEmbeddingSettings) -> None:
        heads = settings.heads
        super().__init__(settings, heads.scale)
        self.stride = 2 ** (heads.scale - 1)
        width = settings.trunk.widths[heads.scale - 1]
        self.hidden = nn.Sequential(convolution(width, width, 3), nn.ReLU(inplace=True))
        self.embedding = nn.Conv2d(width, heads.dimensions, 3, padding=1)
        self.background = nn.Conv2d(width, 1, 1) if heads.foreground == "learned" else None

    def losses(self, batch: Tensor, boxes: list[Tensor], masks: list[Tensor]) -> dict[str, Tensor]:
        settings, (embedding, background) = self.settings.heads, self.maps(batch)
        at = slice(self.stride // 2, None, self.stride)
        labels = label_maps(masks, (batch.shape[2], batch.shape[3]))[:, at, at]
        radius = settings.neighbour_radius * labels.shape[2]
        of_images = [
            embedding_loss(e, l, radius, settings.contrast_weight, settings.max_cells)
            for e, l in zip(embedding, labels, strict=True)
        ]
        losses = {"loss_embedding": torch.stack(of_images).mean()}
        if background is not None:
            losses["loss_background"] = binary_cross_entropy_with_logits(background.float(), (labels == 0).float())
        return losses

    def find(self, batch: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Cells]:
        embedding, background = self.maps(batch)
        with full_precision(batch.device):
            return [
                decode_embedding(
                    embedding[i].float(),
                    None if background is None else background[i].float().sigmoid(),
                    self.stride,
                    size,
                    self.settings.decoding,
                )
                for i, size in enumerate(sizes)
            ]

    def maps(self, batch: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (N, 3, h, w) -> embeddings (N, D, h, w), and logits (N, h, w) of a learned background."""
        hidden = self.hidden(self.decoded(batch)[self.settings.heads.scale])
        return self.embedding(hidden), None if self.background is None else self.background(hidden)[:, 0]
