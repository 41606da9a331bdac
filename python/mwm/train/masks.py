"""The masking policy that the settings of a run describe: five words that read regions as flags say, and every other registered policy by its own name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mwm import masking

if TYPE_CHECKING:
    from mwm.train.config import PretrainConfig

_WORDS = {
    "region": "", "uniform": "", "matched": " (uniform, as many patches as region would hide)", "foreground": " (the same, air last)",
    "auto": ": region where there are regions or a prompt",
}
_SHARED = {"mask_ratio": None, "high": None, "low": None, "min_cover": masking.Policy.min_cover, "empty": "mean"}
"""Settings that have flags of their own, with the value that stands for: not given."""


def own_names() -> list[str]:
    """Registered policies that are none of the five words."""
    return [name for name in masking.list_policies() if name not in _WORDS]


def mask_names() -> list[str]:
    """What `mask` may be."""
    return ["auto", "region", "uniform", "matched", "foreground", *own_names()]


def mask_help() -> str:
    """`--mask`, in the words of --help."""
    words = [f"{word}{says}" for word, says in _WORDS.items()]
    return " | ".join([*words, *(f"{name} ({masking.describe_policy(name)})" for name in own_names())])


def create_policy(config: PretrainConfig) -> masking.Policy:
    """The masking policy of a configuration; of images with an empty region it knows nothing yet.

    Raises:
        ValueError: settings do not go together, or are out of their range.
        TypeError: the policy has no such setting, or a value is of another type.
    """
    if config.mask in own_names():
        given = {name: value for name, default in _SHARED.items() if (value := getattr(config, name)) != default}
        if config.region_weight != 1 and "min_cover" not in masking.settings_of(config.mask):
            given.pop("min_cover", None)  # said of the loss
        return masking.policy_of_run(config.mask, given, config.mask_settings)
    if not config.masks_regions:
        return masking.create_policy("uniform", mask_ratio=0.6 if config.mask_ratio is None else config.mask_ratio)
    shares = {"overall": config.mask_ratio, "high": config.high, "low": config.low}
    region = masking.create_policy("region", **{k: v for k, v in shares.items() if v is not None}, min_cover=config.min_cover, empty=config.empty)
    return masking.create_policy({"matched": "uniform"}.get(config.mask, config.mask), match=region) if config.mask in ("matched", "foreground") else region


def reads(config: PretrainConfig) -> tuple[bool, bool]:
    """Whether the masks of a configuration depend on regions, and on a second map of what is not air."""
    if config.mask in own_names():
        policy = create_policy(config)
        return policy.needs_region, policy.needs_foreground
    found: Any = config.regions is not None or config.prompt is not None
    return config.mask in ("region", "matched", "foreground") or (config.mask == "auto" and found), config.mask == "foreground"
