"""A batch norm whose result nobody has read yet: what follows it, a residual and a ReLU, joins its pass over memory.

Half of the time of norms, additions and activations goes into reading and writing maps again. `F.batch_norm` on packed tiles therefore
takes the moments and moves the running statistics at once, but leaves the normalising to the first reader. An addition
keeps waiting, a ReLU fuses, any other reader gets the plain result.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mwm.ops import batch_norm

from .recompute import remember


class PendingNorm(NamedTuple):
    """A normalised map that is not computed yet.

    Attributes:
        x: what is normalised. [T, C, t, t]
        mean, var: its moments. [C]
        weight, bias: or None. [C]
        eps: added to the variance.
        residual: added after the norm, or None. [T, C, t, t]
        versions: of x and of the residual when they were given; a later write in place would change the result.
    """

    x: Tensor
    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    residual: Tensor | None = None
    versions: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> PendingNorm:
        """Of a map and its moments."""
        return cls(x, mean, var, weight, bias, eps, None, (x._version, 0))

    def plus(self, residual: Tensor) -> PendingNorm:
        """With a map of the same shape and dtype added."""
        return self._replace(residual=residual, versions=(self.versions[0], residual._version))

    def takes(self, residual: Tensor) -> bool:
        """Whether `plus` may be called."""
        return self.residual is None and residual.shape == self.x.shape and residual.dtype == self.x.dtype and residual.device == self.x.device

    def result(self, activation: str | None = None) -> Tensor:
        """Compute it, with a ReLU or none. [T, C, t, t]

        Raises:
            RuntimeError: the map or the residual was written to in the meantime.
        """
        if self.versions != (self.x._version, 0 if self.residual is None else self.residual._version):
            raise RuntimeError("mwm.Packed: a map that a batch norm or the addition after it still has to read was modified in place. "
                               "Write to a copy (x.clone()), or read the norm's result first.")
        out = batch_norm(self.x, self.mean, self.var, self.weight, self.bias, eps=self.eps, residual=self.residual, activation=activation)
        return out if self.residual is not None else remember(out, *self[:6], activation)
