"""The method: densify, decode, compare what was hidden. Sees `active`, never a policy."""

from mwm.mim.decoder import Decoder
from mwm.mim.densify import Densify
from mwm.mim.loss import RECOMMENDED_MIN_STD, LossTerms, divisor, masked_patch_loss
from mwm.mim.model import MaskedImageModel

__all__ = ["RECOMMENDED_MIN_STD", "Decoder", "Densify", "LossTerms", "MaskedImageModel", "divisor", "masked_patch_loss"]
