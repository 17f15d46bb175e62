"""A model that is only looked at: in eval mode, without gradients of its own."""

import contextlib
from collections.abc import Iterator

from torch import nn


def require_eval(model: nn.Module) -> None:
    """Raises ValueError for a model in training mode, where dropout acts."""
    if model.training:
        raise ValueError("need a model in eval mode; call model.eval()")


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of `model` enters a graph that is built in here."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
