"""Token cross-entropy straight from hidden states, in chunks: B x T x V logits are never held whole.

Each chunk works out its gradients in the forward and forgets its logits, so that nothing is recomputed and the memory is that of one chunk.
N = B*T tokens, D d_model, V vocabulary.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hanok.contracts import IGNORE_INDEX


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, targets: Tensor, head: nn.Module, chunk_size: int, *weights: Tensor) -> Tensor:
        wanted = [w for w in weights if w.requires_grad]
        d_hidden, d_weights, total = torch.empty_like(hidden), [torch.zeros_like(w) for w in wanted], hidden.new_zeros((), dtype=torch.float32)
        for part, target, d_part in zip(hidden.split(chunk_size), targets.split(chunk_size), d_hidden.split(chunk_size)):
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                loss = F.cross_entropy(head(leaf).float(), target, ignore_index=IGNORE_INDEX, reduction="sum")
            gradients = torch.autograd.grad(loss, [leaf, *wanted])
            d_part.copy_(gradients[0])
            for kept, new in zip(d_weights, gradients[1:]):
                kept += new
            total += loss.detach()
        ctx.save_for_backward(d_hidden, *d_weights)                                   # let go after the backward
        ctx.wants = [w.requires_grad for w in weights]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        grad, (d_hidden, *d_weights) = grads[0], ctx.saved_tensors
        found = iter(d_weights)
        return d_hidden * grad, None, None, None, *(next(found) * grad if wants else None for wants in ctx.wants)


def chunk_tokens(vocab_size: int) -> int:
    """Tokens whose logits take about 128 MiB in fp32."""
    return max(64, min(4096, 2 ** 25 // vocab_size))


def token_cross_entropy(hidden: Tensor, targets: Tensor, head: nn.Module, *, chunk_size: int = 1024) -> tuple[Tensor, int]:
    """Summed loss (nats) of the targets that are not IGNORE_INDEX, and their number: (B,T,D), (B,T) -> scalar, n.

    The sum and not the mean, so that micro-batches and ranks add up to what one batch would have given.
    """
    flat, wanted = hidden.flatten(0, -2), targets.flatten()
    n_targets = int((wanted != IGNORE_INDEX).sum())
    weights = list(head.parameters())
    if torch.is_grad_enabled() and (hidden.requires_grad or any(w.requires_grad for w in weights)):
        return _ChunkedCrossEntropy.apply(flat, wanted, head, chunk_size, *weights), n_targets
    total = hidden.new_zeros((), dtype=torch.float32)
    for part, target in zip(flat.split(chunk_size), wanted.split(chunk_size)):
        total = total + F.cross_entropy(head(part).float(), target, ignore_index=IGNORE_INDEX, reduction="sum")
    return total, n_targets
