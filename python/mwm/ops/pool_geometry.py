"""Window geometry of a pooling op: where windows lie, how many there are, what they may reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PoolGeometry:
    """Windows of a pooling op on the dense map, in feature positions.

    Attributes:
        mode: "max" or "avg".
        kernel, stride, dilation: (rows, columns).
        left, right, top, bottom: Padding.
        ceil_mode: Also the windows that begin inside the padded map but end beyond it, as in torch.
        count_include_pad: Whether the padding counts in an average.
        divisor: Divisor of an average; 0 means the number of positions.
        pad_value: Value of the padding for max; None means minus infinity.
    """

    mode: str
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    left: int
    right: int
    top: int
    bottom: int
    ceil_mode: bool
    count_include_pad: bool
    divisor: int
    pad_value: float | None

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(H_out, W_out) of the dense op, as torch counts them."""
        return (
            self._count(height, self.top, self.bottom, self.kernel[0], self.stride[0], self.dilation[0]),
            self._count(width, self.left, self.right, self.kernel[1], self.stride[1], self.dilation[1]),
        )

    def _count(self, size: int, before: int, after: int, kernel: int, stride: int, dilation: int) -> int:
        span = size + before + after - dilation * (kernel - 1) - 1
        if not self.ceil_mode:
            return span // stride + 1
        count = -(-span // stride) + 1
        # A window that begins in the padding after the map would be empty; torch drops it.
        return count - 1 if (count - 1) * stride >= size + before else count

    def reach(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the padded map that `size` windows cover."""
        return (
            (size[0] - 1) * self.stride[0] + self.dilation[0] * (self.kernel[0] - 1) + 1,
            (size[1] - 1) * self.stride[1] + self.dilation[1] * (self.kernel[1] - 1) + 1,
        )

    def numbers(self) -> list[int]:
        """The geometry as the integers that the registered op takes (all but `pad_value`)."""
        return [
            int(self.mode == "max"),
            *self.kernel,
            *self.stride,
            *self.dilation,
            self.left,
            self.right,
            self.top,
            self.bottom,
            int(self.ceil_mode),
            int(self.count_include_pad),
            self.divisor,
        ]

    @staticmethod
    def from_numbers(numbers: Sequence[int], pad_value: float | None) -> PoolGeometry:
        """Inverse of `numbers`."""
        n = list(numbers)
        return PoolGeometry(
            "max" if n[0] else "avg",
            (n[1], n[2]),
            (n[3], n[4]),
            (n[5], n[6]),
            n[7],
            n[8],
            n[9],
            n[10],
            bool(n[11]),
            bool(n[12]),
            n[13],
            pad_value,
        )
