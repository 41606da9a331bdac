"""The visible tiles of a batch, as the layers of a network see them: like a tensor, closed by default."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mwm.ops import TilePlan, build_plan, pack_tiles, unpack_tiles

from .extent import Extent, batch_extent
from .pending import PendingNorm
from .refusal import inside_sparsified, refuse
from .registry import dispatch

TILES = "TCHW"  # the axes of what a convolution reads: tile, channel, row, column


class Margin(NamedTuple):
    """Padding that was asked for but belongs to the image, not to each tile; the next conv or pool takes it.

    Attributes:
        left, right, top, bottom: in positions.
        mode: "constant", "reflect", "replicate" or "circular", as F.pad.
        value: of the constant.
    """

    left: int
    right: int
    top: int
    bottom: int
    mode: str
    value: float


class Packed:
    """The visible tiles of a batch of maps, with Tensor's read surface.

    Functions of torch that act per position run on the tiles; those that look sideways or reduce over an image run on
    versions that know each tile's neighbours and image; every other function is refused by name. A reduction over H and
    W returns a plain tensor with one row per image ([B, C, 1, 1] or [B, C]), which broadcasts back to the tiles of its image;
    its value for an image without a visible patch is 0.

    Args:
        tiles: one tile per visible patch. [T, C, t, t]
        plan: where the T tiles lie.

    Raises:
        TypeError: `tiles` is no tensor, or `plan` no plan.
        ValueError: the tiles do not belong to the plan.
    """

    def __init__(self, tiles: Tensor, plan: TilePlan) -> None:
        if not isinstance(tiles, Tensor) or not isinstance(plan, TilePlan):
            raise TypeError(f"Packed: tiles must be a tensor and plan a TilePlan, got {type(tiles).__name__} and {type(plan).__name__}. mwm.pack makes both.")
        if tiles.dim() != 4 or tiles.shape[2] != tiles.shape[3]:
            raise ValueError(f"Packed: tiles must be [T, C, t, t], got {list(tiles.shape)}.")
        if tiles.shape[0] != plan.coords.shape[0]:
            raise ValueError(f"Packed: tiles must have T = {plan.num_tiles} (the plan's visible patches), got {list(tiles.shape)}.")
        self._set(tiles, plan, TILES, None)

    def _set(self, data: Tensor, plan: TilePlan, axes: str, margin: Margin | None, pending: PendingNorm | None = None) -> None:
        self._values, self._plan, self._axes, self._margin, self._pending = data, plan, axes, margin, pending

    @property
    def _data(self) -> Tensor:
        """The tiles as they lie in memory; computes what is pending."""
        if self._pending is not None:
            self._settle(self._pending.result())
        return self._values

    @property
    def _form(self) -> Tensor:
        """A tensor of the data's shape, dtype and place, without computing anything."""
        return self._values if self._pending is None else self._pending.x

    def _settle(self, data: Tensor) -> None:
        self._values, self._pending = data, None

    def _wait(self, pending: PendingNorm) -> Packed:
        """A norm at the same places whose result is computed by whoever reads it first."""
        new = object.__new__(Packed)
        new._set(pending.x, self._plan, TILES, None, pending)
        return new

    def _like(self, data: Tensor, axes: str | None = None, margin: Margin | None = None) -> Packed:
        """Other values at the same places."""
        new = object.__new__(Packed)
        new._set(data, self._plan, self._axes if axes is None else axes, margin)
        return new

    @property
    def tiles(self) -> Tensor:
        """The visible tiles, channels-last in memory where a layer made them. [T, C, t, t]"""
        if self._axes == TILES and self._margin is None:
            return self._data
        if self._axes == "THWC":
            return self._data.permute(0, 3, 1, 2)
        raise refuse("tiles", f"the axes are {self._axes}, with padding pending" if self._margin else f"the axes are {self._axes}")

    @property
    def plan(self) -> TilePlan:
        """Where the tiles lie."""
        return self._plan

    @property
    def active(self) -> Tensor:
        """True where a patch is visible. bool [B, Gh, Gw]"""
        return self._plan.active

    def unpack(self, fill: float = 0.0) -> Tensor:
        """The dense map, `fill` where hidden. [B, C, Gh * t, Gw * t]"""
        tiles = self.tiles
        dense = unpack_tiles(tiles, self._plan, fill)
        if not torch.compiler.is_compiling() and dense.grad_fn is not None and tiles.grad_fn is not None:
            # Autograd runs the youngest nodes first. Maps are unpacked after the last layer, so that the gradients of all of them would be
            # packed at the start of the backward pass and lie in memory until their layers' turn.
            dense.grad_fn._set_sequence_nr(tiles.grad_fn._sequence_nr())
        return dense

    @property
    def shape(self) -> torch.Size:
        """(T, C, t, t); (T, t, t, C) between the permutes of a channels-last block."""
        shape = self._form.shape
        if torch.compiler.is_compiling():
            # Traced code cannot ask who is asking; the number of tiles stays a plain, symbolic number.
            return tuple(Extent(size) if axis in "HW" else size for axis, size in zip(self._axes, shape, strict=True))
        if not inside_sparsified():
            return shape
        sizes = zip(self._axes, shape, strict=True)
        return torch.Size([
            size if axis == "C" else batch_extent(size, self._plan.batch_size) if axis == "T" else Extent(size) for axis, size in sizes
        ])

    def size(self, dim: int | None = None) -> Any:
        """`shape`, or one of its entries."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """Number of axes, 4 as a rule."""
        return len(self._axes)

    def numel(self) -> int:
        """Number of visible values."""
        return self._form.numel()

    def stride(self, dim: int | None = None) -> Any:
        """Strides of the tiles in memory."""
        return self._data.stride() if dim is None else self._data.stride(dim)

    def is_contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> bool:
        """Whether the tiles are, in memory."""
        return self._data.is_contiguous(memory_format=memory_format)

    def is_floating_point(self) -> bool:
        """Whether the values are floating point numbers."""
        return self._form.is_floating_point()

    def is_complex(self) -> bool:
        """Whether the values are complex numbers."""
        return self._form.is_complex()

    def element_size(self) -> int:
        """Bytes of a value."""
        return self._form.element_size()

    ndim = property(dim)
    dtype = property(lambda self: self._form.dtype, doc="Type of the values.")
    device = property(lambda self: self._form.device, doc="Where the tiles lie.")
    layout = property(lambda self: self._form.layout, doc="torch.strided.")
    is_cuda = property(lambda self: self._form.is_cuda, doc="Whether the tiles lie on a CUDA device.")
    is_cpu = property(lambda self: self._form.is_cpu, doc="Whether the tiles lie on the CPU.")
    is_meta = property(lambda self: self._form.is_meta, doc="Whether the tiles have no values.")
    is_sparse = property(lambda self: False, doc="False: a sparse layout of torch is meant.")
    is_quantized = property(lambda self: False, doc="False.")
    requires_grad = property(lambda self: self._data.requires_grad, doc="Whether a gradient reaches the tiles.")
    is_leaf = property(lambda self: self._data.is_leaf, doc="Whether the tiles are a leaf of the graph.")
    grad_fn = property(lambda self: self._data.grad_fn, doc="The node of the graph that made the tiles.")

    def get_device(self) -> int:
        """Number of the CUDA device, -1 on the CPU."""
        return self._form.get_device()

    def __repr__(self) -> str:
        grid = "x".join(map(str, self._plan.grid))
        sizes = ", ".join(f"{axis}={size}" for axis, size in zip(self._axes, self._form.shape, strict=True))
        return f"Packed({sizes}, dtype={self.dtype}, device={self.device}, images={self._plan.batch_size}, grid={grid})"

    def __len__(self) -> int:
        raise refuse("len", "the first axis holds tiles, not images")

    def __bool__(self) -> bool:
        raise refuse("bool", "packed tiles are no single value")

    def __iter__(self) -> Any:
        raise refuse("iteration", "the first axis holds tiles, not images")

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise refuse("conversion to numpy", "it is undefined where hidden", "Use x.unpack() or x.tiles.")

    def __setitem__(self, *_: Any) -> None:
        raise refuse("assignment to an index", "it may reach over tiles")

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return dispatch(func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in _FIELDS or not hasattr(Tensor, name):
            raise AttributeError(f"'Packed' object has no attribute {name!r}")
        if not callable(getattr(Tensor, name)):
            raise refuse(f"torch.Tensor.{name}", "packed tiles do not have it", "Use x.tiles or x.unpack().")

        def refused(*args: Any, **kwargs: Any) -> Any:
            return dispatch(getattr(Tensor, name), (self, *args), kwargs)

        return refused


_FIELDS = frozenset({"_values", "_plan", "_axes", "_margin", "_pending"})


def pack(images: Tensor, active: Tensor | TilePlan, *, visible: int | None = None) -> Packed:
    """Keep the visible patches of a batch of images.

    Args:
        images: [B, C, H, W]
        active: True where a patch is visible; patches are square, of edge H // Gh. It may lie on the CPU beside images on a GPU;
            the plan goes to the images. bool [B, Gh, Gw]. Or the plan that `mwm.ops.build_plan` made of it, which is then not made again.
        visible: Number of visible patches of every image where it is constant: T = B * visible is then known without reading the
            mask. Leave it out where counts differ; a CPU mask is counted on the host, a CUDA mask costs one synchronisation.

    Returns:
        The visible tiles [T, C, p, p] with their plan; the gradient with respect to a hidden pixel is exactly zero.

    Raises:
        TypeError: `images` is no tensor, `active` is not bool, or `visible` is no whole number.
        ValueError: the images do not divide into square patches on the grid, or `visible` is wrong.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"pack: images must be a tensor [B, C, H, W], got {type(images).__name__}.")
    if images.dim() != 4:
        raise ValueError(f"pack: images must be [B, C, H, W], got {list(images.shape)}.")
    made = active if isinstance(active, TilePlan) else None
    active = made.active if made else active
    if isinstance(active, Tensor) and active.dim() == 3:
        batch, rows, columns = active.shape
        height, width = images.shape[2:]
        if batch != images.shape[0]:
            raise ValueError(f"pack: active must have one grid per image, got {batch} for {images.shape[0]} images.")
        if rows < 1 or columns < 1 or height % rows or width % columns or height // rows != width // columns or height < rows:
            raise ValueError(
                f"pack: images must divide into square patches on the grid {rows} x {columns} of active, got H x W = {height} x {width}. "
                "Resize the images, or use a grid of H / p by W / p patches."
            )
    edge = images.shape[2] // max(active.shape[1], 1) if isinstance(active, Tensor) and active.dim() == 3 else 1
    if made and made.patch_size != edge:
        raise ValueError(f"pack: active must be a plan of patches of {edge} pixels, the images' edge over the grid's, got one of {made.patch_size}.")
    plan = made or build_plan(active, edge, visible=visible)
    if visible is None and torch.compiler.is_compiling():
        # A traced graph must know that the number of tiles is no special case.
        torch._check(plan.coords.shape[0] >= 2)
    if plan.device != images.device:
        plan = plan.to(images.device)
    return Packed(pack_tiles(images, plan), plan)
