"""Token cross-entropy straight from hidden states, in chunks: B x T x V logits are never held whole.

Each chunk works out its gradients in the forward and forgets its logits, so that nothing is recomputed and the memory is that of one chunk. What is
asked nothing (85 % of BERT's positions) meets no head. The gradient at the logits is written down in closed form, over the log-probabilities.
N = B*T tokens, M of them asked, D d_model, V vocabulary, n tokens of a chunk.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hanok.contracts import IGNORE_INDEX
from hanok.nn import one_dnn


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, targets: Tensor, index: Tensor | None, head: nn.Module, chunk_size: int, smoothing: float, z_loss: float,
                *weights: Tensor) -> Tensor:
        asked = hidden if index is None else hidden[index]                            # (M,D)
        gradient_of = _by_products if _is_plain(head, asked) else _by_autograd
        d_weights: list[Tensor | None] = [None] * len(weights)                        # the sum over the chunks; None: frozen, or none yet
        d_asked, total = torch.empty_like(asked), hidden.new_zeros((), dtype=torch.float32)
        for part, target, d_part in zip(asked.split(chunk_size), targets.split(chunk_size), d_asked.split(chunk_size)):
            total += gradient_of(head, part, d_part, weights, d_weights, partial(_loss_and_gradient, target, smoothing, z_loss))
        d_hidden = d_asked
        if index is not None:
            d_hidden = torch.zeros_like(hidden)
            d_hidden[index] = d_asked
        ctx.kept = [d_hidden, *d_weights]                                             # the only references: what is added to them is added in place
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        if not ctx.kept:
            raise RuntimeError("the gradients of this loss were asked for a second time; they are worked out in the forward and given once")
        kept, ctx.kept = [None if d is None else d.mul_(grads[0]) for d in ctx.kept], []
        d_hidden, *d_weights = kept
        return d_hidden, *[None] * 6, *d_weights


Chunk = Callable[[Tensor], tuple[Tensor, Tensor]]
"""(n,V) logits -> their summed loss and its gradient there."""


def _by_autograd(head: nn.Module, part: Tensor, d_part: Tensor, weights: Sequence[Tensor], d_weights: list[Tensor | None], of: Chunk) -> Tensor:
    """A chunk through any head: its loss; the gradients are written into `d_part` and added to `d_weights`."""
    with torch.enable_grad():
        leaf = part.detach().requires_grad_()
        logits = head(leaf).float()
    loss, d_logits = of(logits.detach())
    trained = [i for i, w in enumerate(weights) if w.requires_grad]
    d_leaf, *new = torch.autograd.grad(logits, [leaf, *(weights[i] for i in trained)], d_logits)
    d_part.copy_(d_leaf)
    for i, more in zip(trained, new):
        kept = d_weights[i]
        d_weights[i] = more if kept is None else kept.add_(more)
    return loss


def _by_products(head: nn.Module, part: Tensor, d_part: Tensor, weights: Sequence[Tensor], d_weights: list[Tensor | None], of: Chunk) -> Tensor:
    """The same where the head is a matrix on a CPU: oneDNN's product, and sums over the chunks that need no room of their own."""
    weight, bias = weights[0], weights[1] if len(weights) > 1 else None
    loss, d_logits = of(one_dnn.linear(part, weight.detach(), bias))
    torch.mm(d_logits, weight, out=d_part)
    if weight.requires_grad:
        kept = d_weights[0]
        d_weights[0] = d_logits.t() @ part if kept is None else kept.addmm_(d_logits.t(), part)
    if bias is not None and bias.requires_grad:
        kept = d_weights[1]
        d_weights[1] = d_logits.sum(0) if kept is None else kept.add_(d_logits.sum(0))
    return loss


def _is_plain(head: nn.Module, x: Tensor) -> bool:
    """Whether the head is one linear map in fp32 on a CPU that nobody listens to."""
    return (type(head) is nn.Linear and not head._forward_hooks and not head._forward_pre_hooks and x.dtype == torch.float32
            and one_dnn.serves(head.weight) and not torch.is_autocast_enabled(x.device.type))


def _loss_and_gradient(targets: Tensor, smoothing: float, z_loss: float, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The summed loss of (n,V) logits and its gradient there: p (1 + 2 z log Z) - (1-s) onehot - s/V."""
    log_p, index, even = logits.log_softmax(-1), targets[:, None], smoothing / logits.size(-1)
    chosen = log_p.gather(1, index)                                                   # (n,1)
    total = (smoothing - 1) * chosen.sum()
    if smoothing:
        total -= even * log_p.sum()
    gradient = log_p.exp_()
    if z_loss:
        log_z = logits.gather(1, index) - chosen
        total += z_loss * log_z.square().sum()
        gradient *= 1 + 2 * z_loss * log_z
    if smoothing:
        gradient -= even
    return total, gradient.scatter_add_(1, index, torch.full_like(chosen, smoothing - 1))


def chunk_tokens(vocab_size: int) -> int:
    """Tokens whose logits take about 64 MiB in fp32."""
    return max(64, min(4096, 2 ** 24 // vocab_size))


def token_cross_entropy(hidden: Tensor, targets: Tensor, head: nn.Module, *, chunk_size: int = 1024, label_smoothing: float = 0.0,
                        z_loss: float = 0.0, n_targets: int | None = None) -> tuple[Tensor, int]:
    """Summed loss (nats) of the targets that are not IGNORE_INDEX, and their number: (B,T,D), (B,T) -> scalar, n.

    The sum and not the mean, so that micro-batches and ranks add up to what one batch would have given. `label_smoothing` spreads that share of each
    target over the vocabulary (arXiv:1512.00567, 7); `z_loss` times (log Z)^2 is added (PaLM, arXiv:2204.02311, 5). Who has counted the targets
    already says so (`n_targets`), and nothing waits for a device.
    """
    flat, wanted = hidden.flatten(0, -2), targets.flatten()
    is_asked = wanted != IGNORE_INDEX
    n = int(is_asked.sum()) if n_targets is None else n_targets
    index = None if n == len(wanted) else torch.nonzero_static(is_asked, size=n).squeeze(1)
    if index is not None:
        wanted = wanted[index]
    weights = list(head.parameters())
    if torch.is_grad_enabled() and (hidden.requires_grad or any(w.requires_grad for w in weights)):
        return _ChunkedCrossEntropy.apply(flat, wanted, index, head, chunk_size, label_smoothing, z_loss, *weights), n
    total = hidden.new_zeros((), dtype=torch.float32)
    for part, target in zip((flat if index is None else flat[index]).split(chunk_size), wanted.split(chunk_size)):
        logits = head(part).float()
        total = total + F.cross_entropy(logits, target, reduction="sum", label_smoothing=label_smoothing)
        if z_loss:
            total = total + z_loss * logits.logsumexp(-1).square().sum()
    return total, n
