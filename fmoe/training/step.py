"""One step of training as a pure function, from parameters and a batch to the next parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.profiler import record_function

from ..graphs import graphed
from ..models import decoder
from .optim import Optimizer, clip_factor, global_norm

UPDATE = "fmoe::optimizer"  # the range of the update in a profile


class Stepped(NamedTuple):
    """What a step gives.

    ==========  ==========================================================
    ``params``  the next ones, and ``state`` the optimizer's
    ``loss``    before the update, a scalar
    ``norm``    :func:`fmoe.training.optim.global_norm` of the gradients
    ``stats``   :class:`fmoe.models.decoder.LossStats`
    ``grads``   which a donated update may have scaled
    ==========  ==========================================================

    >>> Stepped._fields[:3]
    ('params', 'state', 'loss')
    """

    params: Any
    state: Any
    loss: torch.Tensor
    norm: torch.Tensor
    stats: Any
    grads: Any


def training_step(
    step_of: Callable[..., Any],
    optimizer: Optimizer,
    *,
    max_norm: float,
    bias_rate: float,
    mesh: DeviceMesh | None = None,
    graph: bool = False,
) -> Callable[..., Stepped]:
    """Loss, gradients, clipping, update and balancing of a decoder, as one function.

    ===========  ================================================================================
    step_of      ``(params, *batch) -> ((loss, stats), grads)``, as
                 :func:`fmoe.training.gradients.of_model` gives it
    max_norm     of the gradients, which are scaled to it; infinite: never
    bias_rate    of balancing experts, as for :func:`fmoe.models.decoder.update_biases`
    mesh         with ``pp``, over which the norm is summed
    graph        make it one CUDA graph, by :func:`fmoe.graphed`; each call's results go with the next
    -> function  ``(params, state, learning_rate, *batch) -> Stepped``. It donates ``params`` and ``state``,
                 so the caller must not use them again
    ===========  ================================================================================

    Raises ``ValueError`` unless ``max_norm`` is positive.

    >>> import fmoe
    >>> from fmoe.training import gradients, optim
    >>> config, optimizer = decoder.preset("debug", layers=2), optim.adamw()
    >>> step = training_step(gradients.of_model(config), optimizer, max_norm=1.0, bias_rate=0.01)
    >>> params = decoder.init(config, 0)
    >>> stepped = step(params, optimizer.init(params), 1e-3, *torch.randint(256, (2, 4, 33)).unbind())
    >>> stepped.state.step, len(stepped.stats.layers)
    (tensor(1.), 1)
    """
    clip_factor(torch.zeros(()), max_norm)

    def step(params: Any, state: Any, learning_rate: float | torch.Tensor, *batch: Any) -> Stepped:
        (loss, stats), grads = step_of(params, *batch)
        with record_function(UPDATE):
            norm = global_norm(grads, mesh)
            scale = clip_factor(norm, max_norm)
            params, state = optimizer.update(params, grads, state, learning_rate, scale=scale, donate=True)
            params = decoder.update_biases(params, stats, bias_rate)
        return Stepped(params, state, loss, norm, stats, grads)

    call = graphed(step, donate=(0, 1)) if graph else step

    def with_rate(params: Any, state: Any, learning_rate: float | torch.Tensor, *batch: Any) -> Stepped:
        if batch[0].is_cuda and not isinstance(learning_rate, torch.Tensor):
            # A number would be part of the graph; without one the bits are to be the same.
            learning_rate = torch.full((), learning_rate, device=batch[0].device)
        stepped: Stepped = call(params, state, learning_rate, *batch)
        return stepped

    return with_rate
