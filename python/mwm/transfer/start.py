"""Where a task starts from: a run's encoder, random weights, or a local file of ImageNet weights; and how images are fed to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mwm.data import ReadSettings, Record, UnreadableImage, read_image, read_list
from mwm.train import PretrainConfig, TrainError, load_encoder
from mwm.train.build import build_model
from mwm.train.distributed import World
from mwm.train.export import Encoder, Preprocessing, full_model, head_keys, name_map
from mwm.transfer.config import FinetuneConfig, TransferError
from mwm.transfer.images import LEVELS
from mwm.transfer.labelled import Case

SCRATCH = "scratch"


@dataclass(frozen=True)
class Start:
    """A network and its preprocessing, before the classes are known.

    Attributes:
        name: A timm name or "torchvision/NAME".
        preprocessing: As the run fed its images, with what the settings change; without RUN its mean and std are empty until `fed`.
        notes: What differs from the run, one sentence each.
        config: The settings.
    """

    name: str
    preprocessing: Preprocessing
    notes: tuple[str, ...]
    config: FinetuneConfig

    def fed(self, decoded: Mapping[str, Tensor], cases: Sequence[Case]) -> Start:
        """With mean and deviation of the pixels of these (training) images, where no run gave them.

        Args:
            decoded: Images by name, int16 [C, H, W] in 0 … LEVELS.
            cases: Of the training split.
        """
        if self.preprocessing.mean:
            return self
        images = [decoded[case.record.name].double() / LEVELS for case in cases]
        mean = torch.stack([image.mean((1, 2)) for image in images]).mean(0)
        square = torch.stack([image.square().mean((1, 2)) for image in images]).mean(0)
        std = (square - mean.square()).clamp(min=1e-12).sqrt().clamp(min=1e-3)
        return replace(self, preprocessing=replace(self.preprocessing, mean=tuple(mean.tolist()), std=tuple(std.tolist())))

    def encoder(self, num_classes: int) -> Encoder:
        """The full plain model with its first weights and a fresh head; the head depends on the seed and the architecture alone.

        Raises:
            TransferError: the file of weights does not fit.
        """
        config = self.config
        torch.manual_seed(config.seed)
        if config.run is not None and config.init is None:
            return replace(load_encoder(config.run, num_classes), preprocessing=self.preprocessing)
        model = full_model(self.name, self.preprocessing.channels, num_classes)
        head = head_keys(self.name, model)
        state = initial_state(self.name, self.preprocessing.channels, config.seed) if config.init == SCRATCH else read_state(Path(config.init), model, head)
        model.load_state_dict(state, strict=False)
        return Encoder(model, self.name, head, (), self.preprocessing)


def open_start(config: FinetuneConfig, records: Callable[[ReadSettings], Sequence[Record]] | None = None) -> Start:
    """What the settings start from.

    Args:
        config: Of the task.
        records: Lists the images, where channels have to be found and DATA is nothing that `read_list` takes.

    Raises:
        TransferError, TrainError, DataError: the run, the network's name, the file of weights, or all images cannot be used; with `strict`, the first image that is read.
    """
    notes: list[str] = []
    if config.run is not None:
        found = load_encoder(config.run)
        name, preprocessing = found.name, found.preprocessing
        stored = ReadSettings.from_dict(preprocessing.read)
        settings = replace(stored, **_changes(config))
        differences = settings.differences(stored)
        if differences:
            preprocessing = replace(preprocessing, read=settings.to_dict())
            notes += differences
    else:
        name, settings = config.encoder or "", replace(ReadSettings(), **_changes(config))
        channels = config.channels or _channels(config, settings, records)
        full_model(name, channels, 1)
        preprocessing = Preprocessing(config.size, channels, (), (), settings.to_dict())
        notes.append("No run: the mean and deviation of the pixels are those of the training images.")
    if config.init == SCRATCH:
        notes.append(f"The first weights are random (seed {config.seed}).")
    elif config.init is not None:
        if not Path(config.init).is_file():
            raise TransferError(f"finetune: init must be scratch, or a file of weights, got {config.init!r}, which is no file. Check the path.")
        notes.append(f"The first weights are those of {Path(config.init).name}.")
    return Start(name, preprocessing, tuple(notes), config)


def _changes(config: FinetuneConfig) -> dict[str, Any]:
    return {name: value for name in ("intensity", "aspect") if (value := getattr(config, name)) is not None}


def _channels(config: FinetuneConfig, settings: ReadSettings, list_records: Callable[[ReadSettings], Sequence[Record]] | None) -> int:
    """Channels of the first image of the data that can be read."""
    records = list_records(settings) if list_records is not None else read_list(config.data, settings=settings)
    for record in records:
        try:
            return int(read_image(record, settings).shape[0])
        except UnreadableImage:
            if config.strict:
                raise
    raise TransferError(f"finetune: data must hold at least one readable image, got {len(records)} unreadable ones. Look at the files.")


def initial_state(name: str, channels: int, seed: int) -> dict[str, Tensor]:
    """The weights that `mwm pretrain` with this seed starts from, under the names of the full plain model.

    So "from scratch" and a pre-trained arm of one seed differ in the pre-training alone. A network that cannot be pre-trained
    gets the plain random weights of the seed.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            built = build_model(PretrainConfig(images="-", out="-", encoder=name, channels=channels, seed=seed, decoder_width=64), World(0, 1, torch.device("cpu")))
            # The same call as the export's: what no feature map reaches keeps the values of the seed.
            torch.manual_seed(seed)
            full = full_model(name, channels, 1)
            names = name_map(built.net, full)
            trained = {names[key]: value for key, value in built.net.state_dict().items()}
        except TrainError:
            torch.manual_seed(seed)
            full, trained = full_model(name, channels, 1), {}
    head = set(head_keys(name, full))
    return {key: trained.get(key, value).detach().clone() for key, value in full.state_dict().items() if key not in head}


def read_state(path: Path, model: nn.Module, head: Sequence[str]) -> dict[str, Tensor]:
    """Weights of a local file for a model, without its head.

    A file of other input channels is adapted as timm does it: summed over the channels for grey images, repeated for more. No pickled
    objects are opened.

    Args:
        path: A safetensors file, or a state dict written by torch.save (bare, or under "state_dict" or "model").
        model: The model they are for.
        head: Its entries that may be missing or of another shape.

    Raises:
        TransferError: the file cannot be read, or an entry is missing or of another shape.
    """
    from timm.models import adapt_input_conv

    state = _open(path)
    own = model.state_dict()
    result, adapted = {}, False
    for key, value in own.items():
        if key in head or key.endswith("num_batches_tracked"):
            continue
        given = state.get(key)
        if given is not None and not adapted and given.ndim == 4 and value.ndim == 4 and given.shape != value.shape and given.shape[1] == 3:
            given, adapted = adapt_input_conv(value.shape[1], given), True
        if given is None or given.shape != value.shape:
            what = "lacks it" if given is None else f"has {list(given.shape)}"
            raise TransferError(f"finetune: init must hold {key} {list(value.shape)} of the network, but {path.name} {what}. Give the weights of this very network.")
        result[key] = given.to(value.dtype)
    return result


def _open(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(str(path))
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch.load says to a file of another kind depends on its bytes: KeyError, IndexError, …
        raise TransferError(f"finetune: init must be a safetensors file or a plain state dict, got {path.name}, which is neither ({type(error).__name__}). Save the "
                            "weights with safetensors.") from error
    for inner in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(inner), dict):
            state = state[inner]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise TransferError(f"finetune: init must hold named tensors only, got other values in {path.name}. Save the state dict alone.")
    return {key.removeprefix("module."): value for key, value in state.items()}
