"""Region proposals of FCIS, by torchvision's region proposal network (Ren et al. 2015)."""

from collections.abc import Sequence

from torch import Tensor, nn

from kg_detectron.modeling.fcis.settings import PROPOSAL_LEVELS, ProposalSettings
from kg_detectron.modeling.precision import full_precision

# As published for both FCIS and torchvision: overlaps from which anchors are cells, and below which background, and the
# anchors of an image in the loss.
_POSITIVE, _NEGATIVE, _BATCH, _POSITIVE_PART = 0.7, 0.3, 256, 0.5


class RegionProposals(nn.Module):
    """Boxes that may be cells, from maps at strides 4, 8 and 16.

    Args:
        widths: channels of the maps.
        channels: to which all of them are brought.
        settings: see `ProposalSettings`.
    """

    def __init__(self, widths: Sequence[int], channels: int, settings: ProposalSettings) -> None:
        from torchvision.models.detection.rpn import AnchorGenerator, RegionProposalNetwork, RPNHead  # takes seconds

        super().__init__()
        of_level = len(settings.anchor_sizes) // PROPOSAL_LEVELS
        sizes = [tuple(settings.anchor_sizes[i * of_level :][:of_level]) for i in range(PROPOSAL_LEVELS)]
        anchors = AnchorGenerator(tuple(sizes), (tuple(settings.aspect_ratios),) * PROPOSAL_LEVELS)
        self.widen = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in widths)
        self.network = RegionProposalNetwork(
            anchors,
            RPNHead(channels, anchors.num_anchors_per_location()[0]),
            _POSITIVE,
            _NEGATIVE,
            _BATCH,
            _POSITIVE_PART,
            {"training": settings.candidates, "testing": settings.candidates},
            {"training": settings.training_proposals, "testing": settings.proposals},
            settings.proposal_overlap,
        )

    def forward(
        self,
        batch: Tensor,
        maps: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        boxes: Sequence[Tensor] | None = None,
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Proposals, by falling objectness, and in training the losses of objectness and of boxes.

        Args:
            batch: (N, 3, h, w), the network's input, of which only the size counts.
            maps: three, (N, width, h / stride, w / stride).
            sizes: (H, W) of each image, without the padding; proposals lie within it.
            boxes: in training N tensors (M, 4), those of the cells.

        Returns:
            N tensors (P, 4), xyxy continuous input pixels, without a gradient, and ``loss_objectness``,
            ``loss_proposal_box``, or nothing.
        """
        from torchvision.models.detection.image_list import ImageList

        levels = {str(i): widen(m) for i, (widen, m) in enumerate(zip(self.widen, maps, strict=True))}
        with full_precision(batch.device):
            proposals, losses = self.network(
                ImageList(batch, [(height, width) for height, width in sizes]),
                {name: level.float() for name, level in levels.items()},
                None if boxes is None else [{"boxes": b.float()} for b in boxes],
            )
        names = {"loss_objectness": "loss_objectness", "loss_rpn_box_reg": "loss_proposal_box"}
        return proposals, {names[name]: value for name, value in losses.items()}
