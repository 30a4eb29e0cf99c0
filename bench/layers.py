"""The converted convolutions of ResNet-50's layers 2-4 (output stride 8): shapes, and the least that each must compute and move.
Arithmetic only; nothing runs here."""

from __future__ import annotations

from typing import NamedTuple

from svf_fast.contract import Geometry


class LayerShape(NamedTuple):
    """One convolution, how many `times` it occurs, and what surrounds it. `side` is the picture's at layer 2 (0) or behind its stride."""

    name: str
    times: int
    inputs: int
    outputs: int
    taps: int = 1
    stride: int = 1
    dilation: int = 1
    # in front of layer 2's stride
    is_wide: bool = False
    has_residual: bool = False
    has_relu: bool = True

    @property
    def rank(self) -> int:
        """Number of singular values."""
        return min(self.outputs, self.inputs * self.taps**2)

    @property
    def geometry(self) -> Geometry:
        """Stride, padding and dilation of the V-convolution."""
        padding = self.dilation * (self.taps - 1) // 2
        return Geometry((self.stride,) * 2, (padding,) * 2, (self.dilation,) * 2)

    def sides(self, picture: int) -> tuple[int, int]:
        """Side of the input and of the output, in pixels, for a picture of that side."""
        side = picture
        # the stem's stride, the pooling's, and layer 2's
        for _ in range(2 if self.is_wide else 3):
            side = (side + 1) // 2
        return side, (side + self.stride - 1) // self.stride

    def flops(self, batch: int, picture: int) -> int:
        """Of the forward in factored form; the backward has as many."""
        pixels = batch * self.sides(picture)[1] ** 2
        return 2 * pixels * self.rank * (self.inputs * self.taps**2 + self.outputs)

    def least_bytes(self, batch: int, picture: int, width: int) -> tuple[int, int]:
        """Bytes that forward and backward must move at `width` bytes an element: every input read once, every output written
        once, z kept, one bit an element of mask."""
        before, after = (batch * side**2 for side in self.sides(picture))
        x, y, z = before * self.inputs, after * self.outputs, after * self.rank
        mask = y // 8 if self.has_relu else 0
        residual = y if self.has_residual else 0
        weights = self.rank * (self.inputs * self.taps**2 + self.outputs)
        # a strided 1x1 layer reads the pixels that it visits
        read = after * self.inputs if self.taps == 1 else x
        forward = width * (read + z + y + residual + weights) + mask
        backward = width * (y + z + x + residual + weights) + mask
        return forward, backward


LAYERS = (
    LayerShape("l2 conv1 first", 1, 256, 128, is_wide=True),
    LayerShape("l2 conv2 first", 1, 128, 128, 3, stride=2, is_wide=True),
    LayerShape("l2 conv3", 4, 128, 512, has_residual=True),
    LayerShape("l2 down", 1, 256, 512, stride=2, is_wide=True, has_relu=False),
    LayerShape("l2 conv1", 3, 512, 128),
    LayerShape("l2 conv2", 3, 128, 128, 3),
    LayerShape("l3 conv1 first", 1, 512, 256),
    LayerShape("l3 conv2", 6, 256, 256, 3, dilation=2),
    LayerShape("l3 conv3", 6, 256, 1024, has_residual=True),
    LayerShape("l3 down", 1, 512, 1024, has_relu=False),
    LayerShape("l3 conv1", 5, 1024, 256),
    LayerShape("l4 conv1 first", 1, 1024, 512),
    LayerShape("l4 conv2", 3, 512, 512, 3, dilation=4),
    LayerShape("l4 conv3", 3, 512, 2048, has_residual=True),
    LayerShape("l4 down", 1, 1024, 2048, has_relu=False),
    LayerShape("l4 conv1", 2, 2048, 512),
)
