"""One pre-training run, from a configuration to an encoder."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from mwm.masking import split_maps
from mwm.mim import MaskedImageModel, divisor
from mwm.ops import TilePlan
from mwm.sparse import random_state
from mwm.train import captured, checkpoint, distributed, record
from mwm.train.build import build_model
from mwm.train.config import FREE_ON_RESUME, PretrainConfig, TrainError
from mwm.train.distributed import World
from mwm.train.export import export
from mwm.train.loader import Batch, BatchOrder, MaskedViews, RegionWeigher, create_loader, one_sentence, to_device
from mwm.train.logs import RunLogs
from mwm.train.optim import Schedule, create_optimizer
from mwm.train.panel import write_panel
from mwm.train.prepare import Prepared, list_images, prepare
from mwm.train.resident import ResidentViews

_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def pretrain(config: PretrainConfig, *, localize: Callable[[PretrainConfig], Any] | None = None, command: str | None = None) -> Path:
    """Pre-train an encoder by masked image modelling; under torchrun, on all its processes.

    Every batch, crop, flip, mask and drop-path draw is a pure function of (seed, image id, epoch), so that a run that
    was killed at any moment goes on with `config.resume` to the same weights and metrics.

    Args:
        config: the settings.
        localize: turns `config.prompt` into regions where `config.regions` is None: called with the configuration,
            returns what `regions` accepts, or (that, the localizer's fingerprint).
        command: the command line for run.json.

    Returns:
        The run's folder, with encoder.safetensors, config.yaml, run.json, metrics.csv, tensorboard, panels, checkpoint.

    Raises:
        TrainError: the run cannot start or go on; one sentence. What was written before is whole.

    Source: Mask What Matters (arXiv 2509.23054), training.
    """
    world = distributed.start(config.device)
    try:
        if config.precision == "fp16" and world.device.type != "cuda":
            raise TrainError(f"pretrain: precision must be fp32 or bf16 on {world.device.type}, got fp16. Take bf16.")
        if config.cuda_graph:
            captured.check(world.device, world.size)
        with _as_configured(config, world.device):
            listed = _on_main(world, lambda: list_images(config))
            model = build_model(listed.config, world)
            prepared = _on_main(world, lambda: prepare(listed, localize, world.size))
            with contextlib.ExitStack() as held:
                _on_main(world, lambda: held.enter_context(record.alone(prepared.config, continues=prepared.continues)))
                return _Trainer(model, prepared, world, command).run()
    finally:
        distributed.stop(world)


class _Trainer:
    """The state of a run in flight."""

    def __init__(self, model: MaskedImageModel, prepared: Prepared, world: World, command: str | None) -> None:
        config = prepared.config
        self.model, self.config, self.prepared, self.world, self.command = model, config, prepared, world, command
        self.began = time.monotonic()
        self.order = dict(images=len(prepared.records), batch=prepared.batch, seed=config.seed, epochs=config.epochs)
        self.per_epoch = len(prepared.records) // prepared.batch
        self.schedule = Schedule.of(config, self.per_epoch, prepared.batch)
        self.optimizer = create_optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.precision == "fp16")
        self.environment = record.environment(world.device, world.size)
        self.step, self.seconds_before = 0, 0.0
        self.run_folder = Path(config.out)
        self.pending: list[tuple[int, int, torch.Tensor]] = []

    def run(self) -> Path:
        """Train to the end; returns the run's folder."""
        if self.prepared.continues:
            self._resume()
        self.wrapped = distributed.wrap(self.model, self.world)
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.captured = None
        if self.config.cuda_graph:
            captured.check_masks(self.config.decode, self.prepared.policy.visible(self.config.grid))
            self.captured = captured.CapturedGradients(self._gradients, self.trained, self.config.patch_size, self.world.device)
        if self.world.is_main:
            record.claim_folder(self.config, continues=self.prepared.continues)
            self._write_facts("running")
        distributed.barrier(self.world)
        self.logs = RunLogs(self.run_folder, self.step if self.prepared.continues else None) if self.world.is_main else None
        try:
            self._train()
            if self.world.is_main:
                self._finish()
        except (ValueError, RuntimeError) as error:
            if self.world.is_main:
                with contextlib.suppress(TrainError):
                    self._write_facts("stopped")
            sentence = _sentence(error)
            if isinstance(error, TrainError) or sentence is None:
                raise
            raise TrainError(f"pretrain: {sentence} What was written before is whole; go on with --resume.") from error
        finally:
            if self.logs is not None:
                with contextlib.suppress(TrainError):
                    self.logs.close()
        distributed.barrier(self.world)
        return self.run_folder

    def _train(self) -> None:
        config = self.config
        batches = BatchOrder(**self.order, start=self.step, rank=self.world.rank, world_size=self.world.size)
        loader = self._loader(batches)
        visible = self.prepared.policy.visible(config.grid)
        saved_at, logged_at = time.monotonic(), (time.monotonic(), self.step)
        bar = tqdm(total=self.schedule.steps * self.prepared.batch, initial=self.step * self.prepared.batch, unit="img", desc="pretrain",
                   disable=not (config.progress and self.world.is_main), dynamic_ncols=True)
        with bar:
            for batch in loader:
                self.pending.append((self.step + 1, batch.epoch, self._step(batch, visible)))
                self.step += 1
                bar.update(self.prepared.batch)
                epoch_ends = self.step % self.per_epoch == 0
                save = self._due(saved_at)
                if save or epoch_ends or self.step % config.log_every == 0:
                    loss = self._flush(logged_at)
                    logged_at = (time.monotonic(), self.step)
                    bar.set_postfix_str(f"epoch {batch.epoch + 1}/{config.epochs} loss {loss:.4f}", refresh=False)
                if epoch_ends and self.world.is_main:
                    self._panel(batch.epoch + 1)
                if save:
                    self._save()
                    saved_at = time.monotonic()
        self._save()

    def _loader(self, order: BatchOrder) -> Iterable[Batch]:
        """The batches of the rest of the run."""
        prepared, config, device = self.prepared, self.config, self.world.device
        weigher = RegionWeigher(config.region_weight, config.grid, config.min_cover) if config.region_weight != 1 else None
        if config.cache == "device":
            return ResidentViews(prepared.source(), prepared.transform(), prepared.preprocessing, prepared.policy, config.grid, config.seed, device,
                                 workers=config.workers, weigher=weigher).batches(order)
        views = MaskedViews(prepared.source(), prepared.transform(), prepared.preprocessing.normalise, prepared.policy, config.grid, config.seed, weigher)
        return create_loader(views, order, workers=config.workers, device=device)

    def _step(self, batch: Any, visible: int | None) -> torch.Tensor:
        """One optimizer step; returns [loss, gradient norm, hidden, patches, flat hidden, all hidden error, flat error]."""
        device, config = self.world.device, self.config
        torch.manual_seed(((config.seed * 1_000_003 + self.step) * 4099 + self.world.rank) % 2**63)
        self.schedule.apply(self.optimizer, self.step)
        images = batch.images.to(device, non_blocking=True, memory_format=torch.channels_last)
        patches = torch.stack([(~batch.active).sum(), torch.tensor(batch.active.numel())]).double()
        others = [patches] if batch.weight is None else [patches, batch.weight]
        with random_state(seed=config.seed, ids=batch.ids, epoch=batch.epoch, view=0):
            if self.captured is not None:
                sums = self.captured(images, batch.active, visible, others)
            else:
                active = batch.active if visible is None or device.type == "cpu" else to_device(batch.active, device)
                self.optimizer.zero_grad(set_to_none=True)
                sums = self._gradients(images, active, [to_device(x, device) for x in others], visible)
        total, counted, flat_total, flat_hidden, hidden, patches = sums
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.trained, config.clip if config.clip is not None else math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        everything = total + flat_total if config.min_std else total
        return torch.stack([total / divisor(counted), norm.double(), hidden, patches, flat_hidden, everything, flat_total])

    def _gradients(self, images: torch.Tensor, active: torch.Tensor | TilePlan, others: Sequence[torch.Tensor], visible: int | None = None) -> torch.Tensor:
        """Forward and backward; returns [error, what it is divided by, flat error, flat hidden, hidden, patches], summed over the processes."""
        patches, *weight = others
        half = _AUTOCAST[self.config.precision]
        with torch.autocast(images.device.type, half, enabled=half is not None):
            terms = self.wrapped(images, active, visible=visible, reduction="sum", **({"weight": weight[0]} if weight else {}))
        sums = torch.stack([terms.total.detach(), terms.hidden, terms.flat_total, terms.flat_hidden]).double()
        sums = distributed.sum_over_ranks(torch.cat([sums, patches]), self.world)
        loss = terms.total * (self.world.size / divisor(sums[1])).to(terms.total.dtype)
        self.scaler.scale(loss).backward()
        return sums

    def _flush(self, since: tuple[float, int]) -> float:
        """Bring the pending rows to the logs; returns the last loss."""
        values = torch.stack([row for _, _, row in self.pending]).tolist()
        for (step, epoch, _), (loss, norm, hidden, patches, flat, everything, flat_error) in zip(self.pending, values, strict=True):
            if not (math.isfinite(loss) and (math.isfinite(norm) or self.scaler.is_enabled())):  # a scaler skips such steps itself
                saved = "the checkpoint" if (self.run_folder / checkpoint.NAME).exists() else "what was written"
                raise TrainError(f"pretrain: the loss or gradient of step {step} is not finite (NaN or infinite); {saved} from before is kept. Lower --base-lr, "
                                 "lengthen --warmup-epochs, set --clip, or use --precision fp32, and start a new --out.")
            if self.logs is not None:
                self.logs.row({"step": step, "epoch": epoch, "loss": loss, "lr": self.schedule.lr(step - 1),
                               "weight_decay": self.schedule.weight_decay(step - 1), "grad_norm": norm, "hidden_share": hidden / patches,
                               "flat_hidden_share": flat / max(1.0, hidden), "flat_loss_share": flat_error / everything if everything else 0.0})
        if self.logs is not None and self.pending:
            seconds = time.monotonic() - since[0]
            self.logs.scalar("images_per_second", (self.step - since[1]) * self.prepared.batch / max(seconds, 1e-9), self.step)
            self.logs.flush()
        self.pending = []
        return values[-1][0] if values else math.nan

    def _due(self, saved_at: float) -> bool:
        """Whether a checkpoint is due; by time, rank 0's clock decides for all."""
        config = self.config
        if config.checkpoint_steps and self.step % config.checkpoint_steps == 0:
            return True
        if not config.checkpoint_minutes:
            return False
        if self.world.size > 1 and self.step % config.log_every:
            return False
        return distributed.broadcast_object(time.monotonic() - saved_at >= 60 * config.checkpoint_minutes, self.world)

    def _save(self) -> None:
        if self.pending:
            self._flush((time.monotonic(), self.step))
        if self.world.is_main:
            checkpoint.save(self.run_folder / checkpoint.NAME, {
                "format": checkpoint.FORMAT, "step": self.step, "epoch": self.step // self.per_epoch, "schedule": asdict(self.schedule),
                "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                "settings": {k: v for k, v in self.config.to_dict().items() if k not in FREE_ON_RESUME and k not in ("prompt", "read")},
                "environment": self.environment, "image_list": self.prepared.image_list})
            self._write_facts("running")

    def _resume(self) -> None:
        path = self.run_folder / checkpoint.NAME
        if self.world.is_main:
            checkpoint.clean(self.run_folder)
        if not path.exists():
            return
        state = checkpoint.load(path)
        absent = [name for name in ("settings", "image_list", "model", "schedule", "optimizer", "scaler", "step", "environment") if name not in state]
        if absent:
            raise TrainError(f"checkpoint: {path.parent.name}/{path.name} lacks {absent[0]!r}, which mwm pretrain writes. Restore the run's own files, or start anew with "
                             "--overwrite.")
        ours = self.config.to_dict()
        differ = [name for name, value in state["settings"].items() if ours.get(name) != value]
        if differ or state["image_list"] != self.prepared.image_list:  # shapes alone do not tell two models of one family apart
            what = f"{differ[0]} is {state['settings'][differ[0]]!r} there and {ours.get(differ[0])!r} in config.yaml" if differ else "it has seen other images"
            raise TrainError(f"checkpoint: {path.parent.name}/{path.name} belongs to another run ({what}). Restore the run's own files, or start anew with "
                             "--overwrite.")
        checkpoint.load_into(self.model, state["model"], f"{path.parent.name}/{path.name}")
        if state["schedule"] != asdict(self.schedule):
            raise TrainError(f"pretrain: {path.parent.name}/{path.name} follows another schedule than config.yaml says. Restore the run's own files, or start "
                             "anew with --overwrite.")
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        change = record.environment_change(state["environment"], self.environment)
        if change and self.world.is_main:
            warnings.warn(change, stacklevel=2)
        self.seconds_before = record.read_run_json(self.run_folder).get("wall_time_seconds", 0.0)

    def _panel(self, epoch: int) -> None:
        """Draw the panel of an epoch, counted from 1, where one is due; the last epoch has one."""
        every = self.config.panel_every
        if not every or (epoch % every and epoch != self.config.epochs):
            return
        images, region, ids = self.prepared.samples(self.config.panel_images)
        policy = self.prepared.policy
        active = policy(region if policy.needs_region else None, grid=self.config.grid, seed=self.config.seed, ids=ids, epoch=0)
        write_panel(self.run_folder / "panels" / f"epoch_{epoch:04d}.png", self.model, images, active, self.prepared.preprocessing,
                    split_maps(region)[0] if policy.needs_region else None)

    def _write_facts(self, status: str) -> None:
        record.write_config(self.run_folder, self.config, self.prepared.resolved)
        record.write_run_json(self.run_folder, command=self.command, env=self.environment, seed=self.config.seed, image_list=self.prepared.image_list,
                              localizer=self.prepared.localizer, status=status, steps=self.step,
                              seconds=self.seconds_before + time.monotonic() - self.began)
        self.prepared.write_skipped(self.run_folder)

    def _finish(self) -> None:
        untrained = export(self.run_folder, self.config.encoder, self.model.net, self.prepared.preprocessing, seed=self.config.seed,
                           facts={"epochs": str(self.config.epochs), "steps": str(self.step)})
        if untrained:
            print(f"not trained, since no feature map depends on them: {', '.join(sorted({key.rpartition('.')[0] for key in untrained}))}; they keep their "
                  "initial values.")
        self._write_facts("finished")
        self.prepared.report_skipped()


def _sentence(error: Exception) -> str | None:
    """What an error in mid-run means to the user; None for those that only a traceback explains."""
    if isinstance(error, torch.OutOfMemoryError):
        return "the device has no memory left for this batch. Lower --batch-size or --decoder-width, or take --precision bf16."
    if isinstance(error, RuntimeError):
        return "a loader process was killed, probably for want of memory. Lower --workers." if "DataLoader worker" in str(error) else None
    return one_sentence(error)


def _on_main(world: World, work: Callable[[], Any]) -> Any:
    """Do something on rank 0 and give every rank the result, or the refusal."""
    result = error = None
    if world.is_main:
        try:
            result = work()
        except (ValueError, OSError) as caught:
            error = caught
    if world.size > 1:
        result, text = distributed.broadcast_object((result, str(error) if error is not None else None), world)
        if error is None and text is not None:
            raise TrainError(text)
    if error is not None:
        raise error
    return result


@contextlib.contextmanager
def _as_configured(config: PretrainConfig, device: torch.device) -> Iterator[None]:
    """Threads, deterministic convolutions and torch's random state for the time of a run."""
    threads, settings = torch.get_num_threads(), (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
            if config.threads is not None:
                torch.set_num_threads(config.threads)
            yield
        finally:
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = settings
            torch.set_num_threads(threads)
