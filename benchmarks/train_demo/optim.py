"""The optimizers of the third stage: Muon for the weight matrices of layers, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

Groups = dict[tuple[int, ...], list[nn.Parameter]]


def orthogonal(update: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """Return the nearly orthogonal matrices nearest to a stack of matrices (n, rows, columns), rows <= columns."""
    x = update / (update.norm(dim=(1, 2), keepdim=True) + 1e-7)
    if 2 * x.shape[1] <= x.shape[2]:
        return _all_rounds(x @ x.mT, rounds) @ x
    for _ in range(rounds):
        x = _round(x @ x.mT) @ x
    return x


def _round(gram: torch.Tensor) -> torch.Tensor:
    """Return what a round multiplies matrices of these Gram matrices (n, rows, rows) by."""
    factor = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
    factor.diagonal(dim1=1, dim2=2).add_(3.4445)
    return factor


def _all_rounds(gram: torch.Tensor, rounds: int) -> torch.Tensor:
    """Return the product of all rounds' factors.

    They are polynomials of the same symmetric matrix and so commute: the next round's Gram matrix is this one's between
    two of this round's factors, and long matrices are multiplied once, at the end.
    """
    whole = factor = _round(gram)
    for _ in range(rounds - 1):
        gram = factor @ gram @ factor
        factor = _round(gram)
        whole = factor @ whole
    return whole


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
        for param in params:
            if "moment" not in self.state[param]:
                self.state[param]["moment"] = torch.zeros_like(param)
        moments = [self.state[param]["moment"] for param in params]
        gradients = [param.grad for param in params]
        torch._foreach_lerp_(moments, gradients, 1 - momentum)
        stack = torch.stack(torch._foreach_lerp(gradients, moments, momentum)).flatten(2)
        rows, columns = stack.shape[1:]
        update = orthogonal(stack.mT if rows > columns else stack)
        update = update.mT if rows > columns else update
        scale = 0.2 * max(rows, columns) ** 0.5
        torch._foreach_mul_(params, 1 - rate * decay)
        torch._foreach_add_(params, list(update.reshape(-1, *params[0].shape)), alpha=-rate * scale)


def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the weight matrices of attention and feed-forward layers, and the other parameters."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, param in model.named_parameters():
        inside = ".transformer_blocks." in f".{name}" or ".encoder.layers." in name
        is_matrix = param.ndim == 2 and inside and "norm" not in name
        (matrices if is_matrix else others).append(param)
    return matrices, others
