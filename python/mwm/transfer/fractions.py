"""A share of the labels: which patients keep theirs, the same for every arm and each smaller share inside the larger ones."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from mwm.transfer.labelled import Case


def unit(case: Case) -> str:
    """The patient, or where patients are not known the file: the image itself, or all slices of a volume."""
    return f"patient {case.patient}" if case.patient else f"image {case.file}"


def keep_fraction(cases: Sequence[Case], fraction: float, *, seed: int) -> list[Case]:
    """The cases of a share of the patients of each class.

    Patients stand in the order of a hash of (seed, patient), so that the draw depends on nothing else: not on the encoder, nor on which other
    patients there are. Of each class's patients the first round(fraction · n) are kept, and the first patient that has an image of the class
    always, so that no class is lost.

    Args:
        cases: Of the training split.
        fraction: In (0, 1].
        seed: Of the order.

    Returns:
        Cases in their order.
    """
    if fraction >= 1:
        return list(cases)
    home: dict[str, int] = {}
    holders: dict[int, set[str]] = {}
    for case in cases:
        home.setdefault(unit(case), case.label)
        holders.setdefault(case.label, set()).add(unit(case))
    rank = {name: hashlib.blake2b(f"{seed}\0{name}".encode("utf-8", "surrogateescape"), digest_size=8).digest() for name in home}
    kept = set()
    for label, units in holders.items():
        order = sorted(units, key=rank.__getitem__)
        own = [name for name in order if home[name] == label]
        kept.update([order[0], *own[: round(fraction * len(own))]])
    return [case for case in cases if unit(case) in kept]
