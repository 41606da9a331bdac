"""The model of a run, from its configuration."""

from __future__ import annotations

import torch

from mwm.mim import MaskedImageModel
from mwm.sparse import create_encoder, sparsify
from mwm.train import distributed
from mwm.train.config import PretrainConfig, TrainError
from mwm.train.distributed import World
from mwm.train.export import full_model, name_map


def build_model(config: PretrainConfig, world: World) -> MaskedImageModel:
    """The model of a run on its device, initialised from the seed; checks that its encoder can be exported.

    Raises:
        TrainError: the encoder is unknown, or its strides do not fit the patch size.
    """
    channels = config.channels
    torch.manual_seed(config.seed)
    try:
        full = full_model(config.encoder, channels, 1)
        encoder = create_encoder(config.encoder, channels, **_drop_path(config))
        name_map(encoder, full)
        torch.manual_seed(config.seed)
        model = MaskedImageModel(sparsify(encoder), config.patch_size, config.decoder_width, config.min_std, config.densify_norm, in_chans=channels,
                                 decode=config.decode)
    except TrainError:
        raise
    except (ValueError, TypeError) as error:
        raise TrainError(f"pretrain: {error}") from error
    unreached = set(model.unreached)
    for name, parameter in model.net.named_parameters():
        if name in unreached:
            parameter.requires_grad_(False)
    return distributed.sync_batch_norm(model.to(world.device).train(), world)


def _drop_path(config: PretrainConfig) -> dict[str, float]:
    """The encoder's argument for stochastic depth; refused where the family has none."""
    if not config.drop_path:
        return {}
    if not config.encoder.startswith("torchvision/"):
        return {"drop_path_rate": config.drop_path}
    if not config.encoder.removeprefix("torchvision/").startswith(("convnext", "efficientnet")):
        raise TrainError(f"pretrain: drop_path must be 0 for {config.encoder}, which has no stochastic depth, got {config.drop_path}. Leave it out, or take "
                         "timm's model of that name.")
    return {"stochastic_depth_prob": config.drop_path}
