"""Images that lie on the device: small data sets are decoded once, and no loader stands between them and the GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from mwm.data import JointTransform
from mwm.masking import Policy
from mwm.train.config import TrainError
from mwm.train.export import Preprocessing
from mwm.train.loader import Batch, RegionWeigher, default_workers, to_device

_LEVELS, _MIDDLE = 65535, 32768  # images are kept in the data set's own steps, as int16: half of float32's bytes, and no number changes


class ResidentViews:
    """Batches of augmented, normalised images and their masks, as `MaskedViews` with `create_loader` gives them, without workers.

    Images lie on the device, regions in memory; crops and flips have the same parameters as in a loader. Without crops the numbers are the same,
    too; with them a GPU's resampling may differ from the CPU's in the last bits.

    Args:
        source: `mwm.data.PretrainDataset` without a transform, all images of one size.
        transform: `mwm.data.JointTransform`.
        preprocessing: mean and deviation of the images.
        policy: draws the masks.
        grid: patches along height and width.
        seed: seed of the run.
        device: where the images lie.
        workers: loader processes that decode; None as for training.
        weigher: as in `MaskedViews`.

    Raises:
        TrainError: the images do not fit into the device's memory.
    """

    def __init__(self, source: Dataset, transform: JointTransform, preprocessing: Preprocessing, policy: Policy, grid: tuple[int, int], seed: int,
                 device: torch.device, *, workers: int | None = None, weigher: RegionWeigher | None = None) -> None:
        self.transform, self.policy, self.grid, self.seed, self.device, self.weigher = transform, policy, grid, seed, device, weigher
        reads = policy.needs_region or weigher is not None
        self.mean, self.std = (torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
        count = default_workers() if workers is None else workers
        images, regions, ids = [], [], []
        for chunk in DataLoader(_Decoded(source, reads), batch_size=64, num_workers=count if len(source) > 64 else 0, collate_fn=default_collate):
            images.append(chunk[0])
            regions.append(chunk[1])
            ids.append(chunk[2])
        self.ids = torch.cat(ids)
        self.regions = torch.cat(regions) if reads else None
        try:
            self.images = torch.cat(images).to(device)
        except torch.OutOfMemoryError as error:
            raise TrainError(f"pretrain: cache device must hold {len(self.ids)} images of {images[0][0].numel() * 2 // 1024} KiB in the memory of {device}, which is "
                             "too small. Take --cache ram.") from error

    def batches(self, order: Iterable[Sequence[tuple[int, int]]]) -> Iterator[Batch]:
        """The batches of a `BatchOrder`: images on the device, masks and ids in memory."""
        for keys in order:
            yield self.batch(keys[0][0], [index for _, index in keys])

    def batch(self, epoch: int, rows: Sequence[int]) -> Batch:
        """One batch: the images of these rows in this epoch."""
        chosen = torch.tensor(rows)
        ids = self.ids[chosen]
        images = (self.images[to_device(chosen, self.device)].float() + _MIDDLE) / _LEVELS
        regions = None if self.regions is None else self.regions[chosen]
        height, width = images.shape[-2:]
        boxes = [self.transform.box(height, width, seed=self.seed, id=int(i), epoch=epoch) for i in ids]
        if self.transform.crop_scale == (1.0, 1.0) and self.transform.size == (height, width):
            flipped = torch.tensor([box[4] for box in boxes])
            images = _flip(images, to_device(flipped, self.device))
            regions = None if regions is None else _flip(regions, flipped)
        else:
            views = [self.transform(images[k], None if regions is None else regions[k], seed=self.seed, id=int(i), epoch=epoch) for k, i in enumerate(ids)]
            images = torch.stack([view[0] for view in views])
            regions = None if regions is None else torch.stack([view[1] for view in views])
        active = self.policy(regions if self.policy.needs_region else None, grid=self.grid, seed=self.seed, ids=ids, epoch=epoch)
        return Batch((images - self.mean) / self.std, active, ids, epoch, self.weigher(regions) if self.weigher else None)


class _Decoded(Dataset):
    """Image int16 [C, H, W], region float32 [H, W] or [2, H, W] (or nothing), id."""

    def __init__(self, source: Dataset, with_region: bool) -> None:
        self.source, self.with_region = source, with_region

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        sample = self.source[index]
        image = ((sample["image"] * _LEVELS).round() - _MIDDLE).to(torch.int16)
        return image, sample["region"] if self.with_region else torch.zeros(0), int(sample["id"])


def _flip(x: Tensor, flipped: Tensor) -> Tensor:
    """The images that are marked, mirrored left to right. [B, …, W], bool [B]"""
    return torch.where(flipped.view(-1, *[1] * (x.ndim - 1)), x.flip(-1), x)
