"""VGG-11/13/16/19 with batch norm for small images, after Simonyan & Zisserman 2015 (arXiv:1409.1556), table 1.

As usual for CIFAR, one linear layer stands for the three of the paper; it reads the mean over all pixels, so that any
image size from 32 pixels up will do. Module names follow github.com/kuangliu/pytorch-cifar, whose weights load key by
key.

Letters: B images, H x W pixels.
"""

from __future__ import annotations

from torch import Tensor, nn

from cacp.schema import UserError

# Outputs of the 3x3 convolutions, stage by stage; behind each stage the image is halved.
STAGES: dict[int, tuple[tuple[int, ...], ...]] = {
    11: ((64,), (128,), (256,) * 2, (512,) * 2, (512,) * 2),
    13: ((64,) * 2, (128,) * 2, (256,) * 2, (512,) * 2, (512,) * 2),
    16: ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3),
    19: ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4),
}


class VGG(nn.Module):
    """Takes images (B, 3, H, W) of any H, W >= 32 and returns logits (B, classes).

    Raises:
        UserError: for a depth that is not 11, 13, 16 or 19.
    """

    def __init__(self, depth: int, classes: int) -> None:
        super().__init__()
        if depth not in STAGES:
            raise UserError(f"depth must be one of {', '.join(map(str, STAGES))}, but got {depth=}")
        layers: list[nn.Module] = []
        channels = 3
        for widths in STAGES[depth]:
            for width in widths:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        out = self.features(x)  # (B, 512, H/32, W/32)
        out = self.pool(out).flatten(1)  # (B, 512)
        return self.classifier(out)  # (B, classes)
