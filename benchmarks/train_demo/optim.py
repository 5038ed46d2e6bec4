"""The optimizers of the third stage: Muon for the weight matrices of layers, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

Groups = dict[tuple[int, ...], list[nn.Parameter]]


def orthogonal(update: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """Return the nearly orthogonal matrices nearest to a stack of matrices (n, rows, columns), rows <= columns."""
    x = update / (update.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (K. Jordan and others, 2024), matrices of one shape at a time.

    The update is scaled to the root mean square of AdamW's, so that both take the same learning rate.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.02) -> None:
        super().__init__(list(params), {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step."""
        for group in self.param_groups:
            shapes: Groups = {}
            for param in group["params"]:
                if param.grad is not None:
                    shapes.setdefault(tuple(param.shape), []).append(param)
            for params in shapes.values():
                self._step_shape(params, group["lr"], group["momentum"], group["decay"])

    def _step_shape(self, params: list[nn.Parameter], rate: float, momentum: float, decay: float) -> None:
        moments: list[torch.Tensor] = []
        for param in params:
            state = self.state[param]
            if "moment" not in state:
                state["moment"] = torch.zeros_like(param)
            state["moment"].lerp_(param.grad, 1 - momentum)
            moments.append(torch.lerp(param.grad, state["moment"], momentum).flatten(1))
        stack = torch.stack(moments)
        rows, columns = stack.shape[1:]
        update = orthogonal(stack.mT if rows > columns else stack)
        update = update.mT if rows > columns else update
        scale = 0.2 * max(rows, columns) ** 0.5
        for param, one in zip(params, update, strict=True):
            param.mul_(1 - rate * decay).add_(one.reshape(param.shape), alpha=-rate * scale)


def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the weight matrices of attention and feed-forward layers, and the other parameters."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, param in model.named_parameters():
        inside = ".transformer_blocks." in f".{name}" or ".encoder.layers." in name
        is_matrix = param.ndim == 2 and inside and "norm" not in name
        (matrices if is_matrix else others).append(param)
    return matrices, others
