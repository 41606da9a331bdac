"""No step of fine-tuning makes the host wait for the GPU, and a GPU gives what a CPU gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

from mwm.data import Record
from mwm.train.export import Encoder, Preprocessing
from mwm.transfer import FinetuneConfig
from mwm.transfer.augment import Augment
from mwm.transfer.classify import train
from mwm.transfer.images import LEVELS, CaseImages
from mwm.transfer.labelled import Case

PREPROCESSING = Preprocessing((64, 64), 1, (0.4,), (0.2,), {})


def images(device: str) -> CaseImages:
    generator = torch.Generator().manual_seed(0)
    cases = [Case(Record(Path(str(k)), str(k), k), k % 2, "", "train") for k in range(64)]
    return CaseImages(cases, {str(k): (torch.rand(1, 64, 64, generator=generator) * LEVELS).to(torch.int16) for k in range(64)}, PREPROCESSING, device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_no_step_waits_for_the_device(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model("resnet10t", in_chans=1, num_classes=2).to("cuda", memory_format=torch.channels_last)
    data = images("cuda")
    take = CaseImages.batches

    def watched(self, *args, **kwargs):
        training = kwargs.get("augment") is not None
        inner = take(self, *args, **kwargs)
        first = next(inner)
        torch.cuda.set_sync_debug_mode("error" if training else "default")
        try:
            yield first
            yield from inner
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(CaseImages, "batches", watched)
    config = FinetuneConfig(run="r", data="d", progress=False, epochs=2, batch_size=16, precision=precision, mixup=0.2, flip=True)
    outcome = train(config, Encoder(model, "resnet10t", ("fc.weight", "fc.bias"), (), PREPROCESSING), {"train": data, "val": data, "test": data}, torch.device("cuda"))
    assert len(outcome.history) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_crops_on_the_device_are_those_of_the_cpu() -> None:
    augment = Augment(0.5, True, 3)
    for (x, y, rows), (gx, gy, grows) in zip(images("cpu").batches(16, augment=augment, epoch=2), images("cuda").batches(16, augment=augment, epoch=2), strict=True):
        assert torch.allclose(x, gx.cpu(), atol=1e-4)
        assert torch.equal(y, gy.cpu()) and torch.equal(rows, grows.cpu())
