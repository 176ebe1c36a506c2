"""NaN and infinity are found where they arise, and stop a run before they reach the weights."""

import torch

from support.errors import UserError


class NumericsError(UserError):
    """NaN or infinity where a number belongs. Raised before the optimiser step: the weights are the last good ones.

    quantity: what was not finite ("reward", "log-prob", "policy loss", …).
    indices: flat indices t * N + n of the transitions involved, or None when it is not tied to some.
    """

    def __init__(self, quantity, indices=None):
        super().__init__(
            f"{quantity} is not finite (NaN or infinity); the update was stopped before it reached the weights"
        )
        self.quantity = quantity
        self.indices = indices


def check_finite(quantity, tensor, indices=None):
    """Raise NumericsError naming `quantity` unless every element of `tensor` is finite."""
    finite = torch.isfinite(tensor)
    if not finite.all():
        if indices is None and tensor.dim() == 2:
            # A (T, N) quantity of the whole rollout: tell which transitions.
            indices = (~finite).flatten().nonzero().squeeze(1)
        raise NumericsError(quantity, indices)
