"""One pass over all images before training: which can be read, their mean and deviation, the patches that are region."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mwm.masking import Policy, RegionSurvey, survey_regions
from mwm.train.config import TrainError
from mwm.train.loader import default_workers, one_sentence


@dataclass
class Survey:
    """What the pass found.

    Attributes:
        kept: indices of the readable images.
        skipped: (index, reason) of the others.
        mean, std: per channel, over all pixels of the readable images, on values in [0, 1].
        regions: patches and covered shares of their regions; None where the policy reads none.
    """

    kept: list[int] = field(default_factory=list)
    skipped: list[tuple[int, str]] = field(default_factory=list)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    regions: RegionSurvey | None = None


class _Looks(Dataset):
    """Per image: sums of its values and squares, patches and covered shares of its region; or why it cannot be read."""

    def __init__(self, source: Dataset, policy: Policy, grid: tuple[int, int], unreadable: type[Exception]) -> None:
        self.source, self.policy, self.grid, self.unreadable = source, policy, grid, unreadable

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        try:
            sample = self.source[index]
        except self.unreadable as error:
            return index, str(error), None
        image = sample["image"].double()
        found = None
        if self.policy.needs_region:
            regions = survey_regions([sample["region"]], self.grid, min_cover=self.policy.min_cover)
            found = (regions.inside[0], regions.share[0], None if regions.foreground is None else regions.foreground[0])
        return index, None, (image.sum((1, 2)), image.square().sum((1, 2)), image[0].numel(), found)


def survey(source: Dataset, policy: Policy, grid: tuple[int, int], *, unreadable: type[Exception], workers: int | None, strict: bool,
           progress: bool, names: Sequence[str]) -> Survey:
    """Read every image once.

    Args:
        source: images and regions, not augmented.
        policy: whose `min_cover` says when a patch is region.
        grid: patches along height and width.
        unreadable: the error of a file that cannot be read.
        workers: loader processes; None as for training.
        strict: an unreadable file ends the run.
        progress: show a bar.
        names: of the images, for the sentences.

    Raises:
        TrainError: no image is readable, or one is not under `strict`.
    """
    found, total, squares, pixels, inside, share, foreground = Survey(), 0.0, 0.0, 0, [], [], []
    count = default_workers() if workers is None else workers
    loader = DataLoader(_Looks(source, policy, grid, unreadable), batch_size=None, num_workers=count if len(source) > 64 else 0)
    for index, reason, values in _told(tqdm(loader, total=len(source), desc="reading images", unit="img", disable=not progress, dynamic_ncols=True)):
        if reason is not None:
            if strict:
                raise TrainError(f"pretrain: {names[index]} cannot be read: {one_sentence(ValueError(reason))} Repair or remove it, or leave out --strict.")
            found.skipped.append((index, reason))
            continue
        found.kept.append(index)
        total, squares, pixels = total + values[0], squares + values[1], pixels + values[2]
        if values[3] is not None:
            inside.append(values[3][0])
            share.append(values[3][1])
            if values[3][2] is not None:
                foreground.append(values[3][2])
    if not found.kept:
        raise TrainError(f"pretrain: images must hold at least one readable file, got {len(source)} unreadable ones (first: {found.skipped[0][1]}).")
    mean: Tensor = total / pixels
    std = (squares / pixels - mean.square()).clamp(min=0).sqrt()
    if bool((std < 1e-6).any()):
        raise TrainError("pretrain: images must differ in brightness, but a channel is the same everywhere. Look at the files and at --intensity.")
    found.mean, found.std = tuple(mean.tolist()), tuple(std.tolist())
    if inside:
        found.regions = RegionSurvey(torch.stack(inside), torch.stack(share), torch.stack(foreground) if foreground else None)
    return found


def _told(items: Iterable[Any]) -> Iterator[Any]:
    """The items; an error of a loader process as one sentence."""
    try:
        yield from items
    except ValueError as error:
        raise TrainError(one_sentence(error)) from error
