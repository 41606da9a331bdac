"""One process of test_distributed.py; its place in the world comes from torchrun's environment variables.

python distributed_worker.py MODE OUT writes OUT.rank0.pt, OUT.rank1.pt, …
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from mwm import mim, sparse
from mwm.train import distributed
from mwm.train.distributed import World

COUNTS = {1: [8], 2: [5, 3], 3: [5, 0, 3]}
STEPS = 5


class SmallNet(nn.Module):
    """Maps of stride 4 and 8, with norms, a strided 3x3 and a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 6, 4, stride=4), nn.BatchNorm2d(6), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6))
        self.down = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        x = torch.relu(x + self.body(x))
        return [x, self.down(x)]


def share_of(world: World, items: Tensor, counts: list[int] | None = None) -> Tensor:
    """This rank's part of a joint batch: contiguous, equal unless counts say otherwise."""
    counts = counts or [len(items) // world.size] * world.size
    begin = sum(counts[: world.rank])
    return items[begin : begin + counts[world.rank]]


def norm(world: World, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """One forward and backward of a synchronised norm with counts that differ by rank."""
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(4, momentum=0.3).double()
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    joint, weights = torch.randn(8, 4, 3, 2).double() * 3 + 1, torch.randn(8, 4, 3, 2).double()
    before = set(layer.state_dict())
    layer = distributed.sync_batch_norm(layer.to(dtype), world)
    assert isinstance(layer, nn.BatchNorm2d)
    assert set(layer.state_dict()) == before
    x = share_of(world, joint, COUNTS[world.size]).to(dtype).requires_grad_()
    out = layer(x)
    (out * share_of(world, weights, COUNTS[world.size]).to(dtype)).sum().backward()
    grads = {name: distributed.sum_over_ranks(p.grad, world) for name, p in layer.named_parameters()}
    evaluated = layer.eval()(x).detach()
    return {"out": out.detach(), "grad": x.grad, "evaluated": evaluated, **grads, **{k: v.clone() for k, v in layer.named_buffers()}}


def few(world: World) -> dict[str, Tensor]:
    """Norms over one value in all, and over none."""
    found = {}
    for name, total in (("one", 1), ("none", 0)):
        layer = distributed.sync_batch_norm(nn.BatchNorm2d(3), world)
        x = torch.full((total if world.rank == 1 else 0, 3, 1, 1), 5.0, requires_grad=True)
        out = layer(x)
        out.sum().backward()
        found |= {f"{name} out": out.detach(), f"{name} grad": x.grad, f"{name} mean": layer.running_mean, f"{name} var": layer.running_var}
    return found


def sums(world: World) -> dict[str, Tensor]:
    """Sums over ranks of numbers whose order matters."""
    found = {}
    for size in (0, 1, 2, 7, 1000):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            values = torch.randn(size, generator=torch.Generator().manual_seed(world.rank)).to(dtype) * 10 ** world.rank
            found[f"part {size} {dtype}"], found[f"sum {size} {dtype}"] = values, distributed.sum_over_ranks(values, world)
    found["scalar"] = distributed.sum_over_ranks(torch.tensor(float(world.rank + 1)), world)
    found["word"] = torch.tensor(distributed.broadcast_object({"rank": world.rank}, world)["rank"])
    distributed.barrier(world)
    return found


def batch(blind: bool) -> tuple[Tensor, Tensor]:
    """Six images with masks of different size; the last ones show nothing: two, or with `blind` three."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(6, 1, 24, 16, generator=generator, dtype=torch.float64)
    active = torch.rand(6, 3, 2, generator=generator) < 0.5
    active[3 if blind else 4 :] = False
    active[0] = True  # nothing hidden: this image adds nothing to the loss
    return images, active


def train(world: World, *, dtype: torch.dtype, blind: bool = False, resume: bool = False, decode: str = "dense") -> dict[str, Tensor]:
    """Five steps as the trainer does them; with `resume`, through a state saved after three."""
    images, active = batch(blind)
    losses = []

    def fresh() -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = mim.MaskedImageModel(sparse.sparsify(SmallNet()), patch_size=8, decoder_width=16, decode=decode).to(dtype)
        distributed.sync_batch_norm(model.train(), world)
        # Over hidden positions alone the last norm's bias has a gradient of zero, whose rounding error AdamW would blow up.
        kind = torch.optim.AdamW if decode == "dense" else torch.optim.SGD
        optimizer = kind(model.parameters(), lr=0.02)
        return model, distributed.wrap(model, world), optimizer

    model, wrapped, optimizer = fresh()
    for step in range(STEPS):
        if resume and step == 3:
            saved = model.state_dict(), optimizer.state_dict()
            model, wrapped, optimizer = fresh()
            model.load_state_dict(saved[0]), optimizer.load_state_dict(saved[1])
        roll = step if not blind else 0
        mine = share_of(world, images.to(dtype).roll(roll, 0)), share_of(world, active.roll(roll, 0))
        terms = wrapped(*mine, reduction="sum")
        scale = distributed.global_hidden_scale(terms.hidden, world)
        loss = terms.total * scale.to(dtype)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(distributed.sum_over_ranks(loss.detach().double(), world) / world.size)
    return {"losses": torch.stack(losses), **{name: value.clone() for name, value in model.state_dict().items()}}


MODES = {
    "norm": norm,
    "norm32": lambda world: norm(world, torch.float32),
    "few": few,
    "sums": sums,
    "train": lambda world: train(world, dtype=torch.float64),
    "train blind": lambda world: train(world, dtype=torch.float64, blind=True),
    "train hidden": lambda world: train(world, dtype=torch.float64, decode="hidden"),
    "train32": lambda world: train(world, dtype=torch.float32),
    "resume32": lambda world: train(world, dtype=torch.float32, resume=True),
}


def main(modes: str, out: str) -> None:
    """Run some modes, separated by commas, and save what each found."""
    torch.set_num_threads(1)
    world = distributed.start("cpu")
    found = {f"{mode}/{name}": value for mode in modes.split(",") for name, value in MODES[mode](world).items()}
    torch.save(found, f"{out}.rank{world.rank}.pt")
    distributed.stop(world)


if __name__ == "__main__":
    main(*sys.argv[1:])
