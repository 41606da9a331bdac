"""Sizes of a tile that look like numbers but refuse to be computed with as if they were the sizes of the image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from .refusal import refuse
from .registry import named


def _comparison(name: str) -> Callable[[Any, Any], bool]:
    def method(self: Extent, other: Any) -> bool:
        if isinstance(other, int | float) and not isinstance(other, Extent):
            raise refuse(f"the comparison of the batch size, height or width with {other}", "the numbers are those of the tiles, not of the images",
                         "Keep what depends on the size of the image out of the sparsified net.")
        return getattr(int, name)(self, other)

    method.__name__ = name
    return method


class Extent(int):
    """Height or width as a layer of a sparsified net sees it: the edge of a tile, in positions.

    A layer may compare it with the size of another map, print it, pass it on as a size and compute "same" padding from it (remainders,
    quotients, its distance to a number), all of which give the dense answer whenever the stride divides the tile. Products such as
    `height * width`, the count in a hand-written mean, and comparisons with a number would be those of a tile, so they are refused.
    """

    def _refuse(self, *_: Any) -> NoReturn:
        raise refuse("arithmetic with the batch size, height or width", "the numbers are those of the tiles, not of the images",
                     "Write the layer with mean or sum over H and W, or keep it out of the sparsified net.")

    __mul__ = __rmul__ = __pow__ = __rpow__ = __add__ = __radd__ = __sub__ = __neg__ = __float__ = _refuse
    __rtruediv__ = __rfloordiv__ = _refuse

    __lt__, __le__, __gt__, __ge__, __eq__, __ne__ = (_comparison(name) for name in ("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__"))
    __hash__ = int.__hash__

    def __floordiv__(self, divisor: int) -> Extent:
        return type(self)._of(int(self) // divisor, self)

    @classmethod
    def _of(cls, value: int, like: Extent) -> Extent:
        return Extent(value)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """A function on dense tensors that was given sizes of packed tiles: the batch size is put right, the rest refused."""
        if func in _BATCH_FIRST:
            extent = _extent_of_rows(func, args)
            return func(*_dense_sizes(func, args, extent), **{key: _dense_sizes(func, value, extent) for key, value in (kwargs or {}).items()})
        raise refuse(func, "it computes with the batch size, height or width of the tiles as if they were the images'")


class Batch(Extent):
    """The number of tiles as a layer sees it where it asks for the batch size.

    Attributes:
        images: the number of images, which is what a tensor of one row per image has as its batch size.
    """

    images: int

    @classmethod
    def _of(cls, value: int, like: Extent) -> Extent:
        raise refuse("arithmetic with the batch size", "the number is that of the tiles, not of the images")


def batch_extent(tiles: int, images: int) -> Batch:
    """The size of the leading axis of packed tiles."""
    extent = Batch(tiles)
    extent.images = images
    return extent


# Functions on (or makers of) tensors of one row per image, where a leading Batch means the number of images.
_BATCH_FIRST = set(named(["view", "reshape", "expand", "new_empty", "new_zeros", "new_ones", "new_full", "empty", "zeros", "ones", "full", "rand", "randn"]))


def _extent_of_rows(function: Callable, args: tuple) -> int | None:
    """What a height or width means for a tensor of one row per image, which broadcasts to the map later by itself."""
    name = getattr(function, "__name__", "")
    if name == "expand":
        return -1
    is_row = name in ("view", "reshape") and isinstance(args[0], torch.Tensor) and args[0].dim() > 2 and args[0].shape[-2:] == (1, 1)
    return 1 if is_row else None


def _dense_sizes(function: Callable, values: Any, extent: int | None) -> Any:
    if isinstance(values, Batch):
        return values.images
    if isinstance(values, Extent) and extent is not None:
        return extent
    if isinstance(values, Extent):
        raise refuse(function, "it makes or views a dense tensor with the height or width of a tile")
    if isinstance(values, tuple | list | torch.Size):
        return tuple(_dense_sizes(function, value, extent) for value in values)
    return values
