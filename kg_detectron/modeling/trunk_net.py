"""Base of the methods whose heads read decoder maps of the shared trunk."""

from typing import Any

from torch import Tensor

from kg_detectron.modeling.backbone import build_backbone
from kg_detectron.modeling.instance_net import InstanceNet
from kg_detectron.modeling.trunk import build_trunk


class TrunkNet(InstanceNet):
    """Backbone and trunk of a method; its settings have the parts ``backbone`` and ``trunk``.

    Args:
        settings: of the method.
        lowest: the lowest decoder map that its heads read, 1..4.
        reads_c0: whether something besides the trunk reads c0.
    """

    def __init__(self, settings: Any, lowest: int, reads_c0: bool = False) -> None:
        super().__init__(settings)
        backbone: Any = build_backbone(settings.backbone)
        self.backbone = backbone
        self.divisor = backbone.divisor
        self.trunk = build_trunk(settings.trunk, backbone.channels, settings.backbone.norm, lowest)
        self.reads_c0 = reads_c0 or lowest == 1
        if not self.reads_c0:  # distributed training wants no parameter without a gradient
            backbone.c0_conv.requires_grad_(False)

    @classmethod
    def build(cls, settings: Any = None) -> "TrunkNet":
        """The network of settings, by default the method's."""
        return cls(settings or cls.Settings())  # type: ignore[call-arg]  # methods know their lowest map

    def features(self, batch: Tensor) -> list[Tensor]:
        """Images (N, 3, h, w) -> [c0, c1, c2, c3, c4]; the images stand in for c0 where nothing reads it."""
        backbone: Any = self.backbone
        return backbone(batch) if self.reads_c0 else [batch, *backbone.deep_features(batch)]

    def decoded(self, batch: Tensor) -> dict[int, Tensor]:
        """Images (N, 3, h, w) -> the decoder maps by scale, from s4 up to the lowest one."""
        return self.trunk(self.features(batch))
