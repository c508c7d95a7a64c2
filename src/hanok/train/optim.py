"""Optimizers, and which parameters they take. What a parameter is, is told by the module that holds it and never by its name.

Matrices decay, vectors (biases, norms) do not. Muon, where asked for, takes the hidden matrices; all the rest is AdamW's.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hanok.errors import ConfigError
from hanok.nn.convolution import GatedConvolution
from hanok.nn.recurrent import GRUCell, LSTMCell
from hanok.train.muon import Muon
from hanok.train.recipe import TrainRecipe

NOT_HIDDEN = (nn.Embedding, GRUCell, LSTMCell, GatedConvolution)
"""Modules whose matrices are no plain maps from one hidden vector to another."""
BESIDE_MUON = 12
"""Times learning_rate, for embeddings and heads: Muon's updates and Adam's are equally long, and a token's row is moved by few of them.
Beside AdamW's matrices of a recurrence it is as right."""


def optimizers(model: nn.Module, recipe: TrainRecipe) -> list[torch.optim.Optimizer]:
    """The recipe's optimizers over all that is trained, each group at its own peak. ConfigError where everything is frozen."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ConfigError("no parameter of this model is trained: all are frozen; set requires_grad on those that should learn")
    made: list[torch.optim.Optimizer] = []
    hidden = hidden_matrices(model) if recipe.optimizer == "muon" else []
    if hidden:
        rate = recipe.learning_rate if recipe.muon_learning_rate is None else recipe.muon_learning_rate
        made.append(Muon(hidden, rate, recipe.muon_momentum, recipe.weight_decay))
    taken = {id(p) for p in hidden}
    rest = [p for p in trained if id(p) not in taken]
    if rest:
        made.append(adamw(rest, outside(model), recipe))
    set_learning_rates(made, 1.0)
    return made


def adamw(params: Sequence[Tensor], outside: set[int], recipe: TrainRecipe) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101), fused; tensors of two or more dimensions decay, those of `outside` may have a rate of their own."""
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for p in params:
        rate = embedding_rate(recipe) if id(p) in outside else recipe.learning_rate
        decay = recipe.weight_decay if p.ndim >= 2 else 0.0
        groups.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay})["params"].append(p)
    return torch.optim.AdamW(list(groups.values()), betas=(recipe.beta1, recipe.beta2), eps=recipe.eps, fused=True)


def embedding_rate(recipe: TrainRecipe) -> float:
    """The peak of embeddings and heads."""
    if recipe.embedding_learning_rate is not None:
        return recipe.embedding_learning_rate
    return recipe.learning_rate * (BESIDE_MUON if recipe.optimizer == "muon" else 1)


def outside(model: Any) -> set[int]:
    """The id of each parameter of an embedding or of the head: where tokens enter and leave."""
    modules = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return {id(p) for module in (*modules, model.head) for p in module.parameters()}


def hidden_matrices(model: Any) -> list[Tensor]:
    """Weights of linear layers that are trained and neither in the head nor an embedding, a recurrence, a convolution or a single row or column."""
    apart = outside(model) | {id(p) for module in model.modules() if isinstance(module, NOT_HIDDEN) for p in module.parameters()}
    linear = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    return [w for key, w in linear.items() if key not in apart and w.requires_grad and min(w.shape) > 1]


def set_learning_rates(optimizers: Sequence[torch.optim.Optimizer], share: float) -> None:
    """Every group's rate as a share of its own peak: the rate that it was made with, kept in group["peak"]."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group.setdefault("peak", group["lr"])
