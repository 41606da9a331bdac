"""`bottleneck` against the procedure of the authors of M2IB, seconds per image: CLIP ViT-B/16 at 224 with random weights.

Block 7 is what MedCLIP-SAMv2 and the paper's code take, block 9 what M2IB's own examples take; the authors' time does not depend on it.

The rival's ten steps cost the same each, so one of them is timed and counted ten times; ours is timed whole, preprocessing and text included.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from mwm.bench.authors_m2ib import authors_map
from mwm.bench.harness import Case, Check, Match
from mwm.bench.random_clip import random_clip
from mwm.bench.settings import Settings

from mwm.localize.checkpoints import quiet_transformers

AUTHORS = "the authors' procedure"
ONE_BY_ONE = "the same, one by one"
TEXT = "both lungs"


@functools.lru_cache(maxsize=1)
def _folder(sizes: tuple[tuple[str, int], ...]) -> Path:
    holder = tempfile.TemporaryDirectory(prefix="mwm-bench-")
    _kept.append(holder)
    with quiet_transformers(bars=False):
        return random_clip(Path(holder.name), **dict(sizes))


_kept: list[tempfile.TemporaryDirectory] = []  # removed when the process ends


class Sides:
    """Ours and theirs on the same weights and images."""

    def __init__(self, layer: int, device: str, sizes: dict[str, int]) -> None:
        from transformers import AutoTokenizer, CLIPModel

        from mwm.localize import create_localizer

        folder = _folder(tuple(sorted(sizes.items())))
        self.layer, self.device = layer, device
        self.ours = functools.partial(create_localizer, "bottleneck", checkpoint=folder, device=device, layer=layer, beta=0.1)
        with quiet_transformers(bars=False):
            self.model = CLIPModel.from_pretrained(folder).to(device).eval()
        self.tokens = dict(AutoTokenizer.from_pretrained(folder)([TEXT], return_tensors="pt").to(device))
        edge = self.model.config.vision_config.image_size
        self.images = torch.rand(8, 1, edge, edge, generator=torch.Generator().manual_seed(3))

    def pixels(self) -> torch.Tensor:
        """The first image as the model wants it."""
        return self.ours(copies=1, steps=2).tower.preprocess(self.images[:1])

    def check(self) -> Check:
        """The largest difference of the two maps under the same noise; two copies and three steps, which is the same code as ten and ten."""
        from mwm.localize.bottleneck import image_seed

        mine = self.ours(copies=2, steps=3)(self.images[:1], [TEXT])[0]
        generator = torch.Generator(self.device).manual_seed(image_seed(self.images[0], 0))
        theirs = authors_map(self.model, self.pixels(), self.tokens, self.layer, lambda shape: torch.randn(shape, generator=generator, device=self.device), steps=3, copies=2)
        self.model.zero_grad(set_to_none=True)
        return Check(float((mine - theirs.to(mine.device)).abs().max()), 1e-4)


@functools.lru_cache(maxsize=1)
def _sides(layer: int, device: str, sizes: tuple[tuple[str, int], ...]) -> Sides:
    return Sides(layer, device, dict(sizes))


def _read(call: Callable[[], object], device: str, times: float) -> Callable[[], float]:
    """Seconds of a call, times a factor."""
    def read() -> float:
        start = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        return times * (time.perf_counter() - start)

    return read


def prepare(setting: str, *, layer: int, device: str = "cpu", precision: str = "fp32", sizes: dict[str, int]) -> Match:
    """One image: ours whole, against ten times one of the authors' steps."""
    sides = _sides(layer, device, tuple(sorted(sizes.items())))
    localizer, pixels = sides.ours(setting=setting, precision=precision), sides.pixels()
    theirs = partial(authors_map, sides.model, pixels, sides.tokens, layer, lambda shape: torch.randn(shape, device=device), steps=1)
    return Match(_read(lambda: localizer(sides.images[:1], [TEXT]), device, 1.0), {AUTHORS: _read(theirs, device, 10.0)}, {AUTHORS: sides.check()}, unit="s", warmup=1,
                 notes={"": "theirs: one of ten equal steps, times ten" + ("" if setting == "faithful" else "; the check is of the faithful setting")})


def prepare_batch(setting: str, *, layer: int, device: str = "cpu", images: int = 8, sizes: dict[str, int]) -> Match:
    """Several images in one call, against one by one."""
    sides = _sides(layer, device, tuple(sorted(sizes.items())))
    localizer, batch = sides.ours(setting=setting), sides.images[:images]
    texts = [TEXT] * images

    def alone() -> torch.Tensor:
        return torch.cat([localizer(batch[k : k + 1], [TEXT]) for k in range(images)])

    check = Check(float((localizer(batch, texts) - alone()).abs().max()), 1e-4)
    return Match(_read(lambda: localizer(batch, texts), device, 1 / images), {ONE_BY_ONE: _read(alone, device, 1 / images)}, {ONE_BY_ONE: check}, unit="s", warmup=0)


def cases(settings: Settings) -> list[Case]:
    """Faithful, fast and bfloat16 against the authors; batched against one by one."""
    if settings.smoke:
        sizes = {"width": 32, "depth": 4, "heads": 4, "size": 64, "text_width": 64, "text_depth": 2, "positions": 24}
        return [Case("localize", "smoke: faithful", partial(prepare, "faithful", layer=1, sizes=sizes), 1),
                Case("localize", "smoke: fast", partial(prepare, "fast", layer=1, sizes=sizes), 1),
                Case("localize", "smoke: fast, batched", partial(prepare_batch, "fast", layer=1, images=3, sizes=sizes), 1)]
    kinds = (("", 7, "fp32"), (", block 9", 9, "fp32"), (", bfloat16", 7, "bf16"))
    found = [Case("localize", f"{setting}{name}", partial(prepare, setting, layer=layer, precision=precision, sizes={}), 3, extra=bool(name))
             for name, layer, precision in kinds for setting in ("faithful", "fast")]
    return [*found, *(Case("localize", f"{setting}, batched", partial(prepare_batch, setting, layer=7, images=n, sizes={}), 2)
                      for setting, n in (("faithful", 2), ("fast", settings.batch or 8)))]
