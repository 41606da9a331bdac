"""No step of training a mask head makes the host wait for the GPU, and a GPU moves images and labels as a CPU does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mwm.data import Record
from mwm.train.export import Encoder, Preprocessing, full_model, head_keys
from mwm.transfer.augment import Augment
from mwm.transfer.images import LEVELS
from mwm.transfer.labelled import Case
from mwm.transfer.pyramid import mask_network
from mwm.transfer.segment import mask_loss
from mwm.transfer.segment_images import Decoded, MaskedSet

PREPROCESSING = Preprocessing((64, 64), 1, (0.4,), (0.2,), {})


def masked(device: str) -> MaskedSet:
    generator = torch.Generator().manual_seed(0)
    cases = [Case(Record(Path(str(k)), str(k), k), 0, "", "train") for k in range(32)]
    decoded = {}
    for case in cases:
        image = torch.rand(1, 64, 64, generator=generator)
        decoded[case.record.name] = Decoded((image * LEVELS).to(torch.int16), (image[0] > 0.7).to(torch.uint8), (64, 64), None)
    return MaskedSet(cases, decoded, PREPROCESSING, torch.device(device))


def encoder() -> Encoder:
    model = full_model("resnet10t", 1, 1)
    return Encoder(model, "resnet10t", head_keys("resnet10t", model), (), PREPROCESSING)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_no_step_waits_for_the_device(precision: torch.dtype) -> None:
    network = mask_network(encoder(), 3).to("cuda", memory_format=torch.channels_last)
    batches = masked("cuda").batches(8, augment=Augment(0.5, True, 0))
    losses = []
    for number in range(3):
        images, labels = next(batches)
        with torch.autocast("cuda", precision, enabled=precision != torch.float32):
            loss = mask_loss(network(images), labels)
        loss.backward()
        losses.append(loss.detach())
        if number == 0:  # the first step makes plans and buffers
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(torch.stack(losses)).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_images_and_labels_on_the_device_are_those_of_the_cpu() -> None:
    augment = Augment(0.5, True, 3)
    for (x, y), (gx, gy) in zip(masked("cpu").batches(16, augment=augment, epoch=2), masked("cuda").batches(16, augment=augment, epoch=2), strict=True):
        assert torch.allclose(x, gx.cpu(), atol=1e-4)
        assert (y == gy.cpu()).float().mean() > 0.999  # a sample between two pixels may fall on either
