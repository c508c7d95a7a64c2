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

Chunk = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""(n,) targets and (n,W) logits, of which the first V are a vocabulary's -> (n,) losses, and their gradient at all W: nothing at the others."""
Gradient = Callable[[float, float, Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""The same of any smoothing and z-loss."""
TILE = 64
"""A head's rows come in a multiple of this on a GPU: products with 50,257 of them ran at an eighth of an H100's rate."""
LEAST_ROWS = 512
"""Tokens of the smallest chunk there. A chunk is as large as the batch's others, or this times a power of two: a compiler meets few sizes, and always
the same ones, whatever a run began with."""


def loss_and_gradient(smoothing: float, z_loss: float, targets: Tensor, logits: Tensor, n_classes: int) -> tuple[Tensor, Tensor]:
    """The losses of (n,V) logits and their gradient there: p (1 + 2 z log Z) - (1-s) onehot - s/V. Spare columns get nothing."""
    log_p = logits[:, :n_classes].log_softmax(-1, dtype=torch.float32)
    index, even, spare = targets[:, None], smoothing / n_classes, logits.size(-1) - n_classes
    chosen = log_p.gather(1, index)                                                   # (n,1)
    losses = (smoothing - 1) * chosen
    if smoothing:
        losses -= even * log_p.sum(-1, keepdim=True)
    gradient = log_p.exp_()
    if z_loss:
        log_z = logits.gather(1, index) - chosen
        losses += z_loss * log_z.square()
        gradient *= 1 + 2 * z_loss * log_z
    if smoothing:
        gradient -= even
    gradient = gradient.scatter_add_(1, index, torch.full_like(chosen, smoothing - 1)).to(logits.dtype)
    return losses.squeeze(1), F.pad(gradient, (0, spare)) if spare else gradient


def for_compilers(smoothing: float, z_loss: float, targets: Tensor, logits: Tensor, n_classes: int) -> tuple[Tensor, Tensor]:
    """What `loss_and_gradient` answers, said so that a compiler makes two passes of it: one over the logits for their sum, one for the gradient."""
    columns = torch.arange(logits.size(-1), device=logits.device)
    real, even = columns < n_classes, smoothing / n_classes
    x = logits.float().masked_fill(~real, float("-inf"))
    log_z = x.logsumexp(-1, keepdim=True)                                             # (n,1)
    losses = (smoothing - 1) * (x.gather(1, targets[:, None]) - log_z)
    gradient = (x - log_z).exp()
    if smoothing:
        losses = losses - even * (x - log_z).masked_fill(~real, 0.0).sum(-1, keepdim=True)
    if z_loss:
        losses = losses + z_loss * log_z.square()
        gradient = gradient * (1 + 2 * z_loss * log_z)
    gradient = gradient + (columns == targets[:, None]) * (smoothing - 1)
    return losses.squeeze(1), (gradient - even * real if smoothing else gradient).to(logits.dtype)


# ---- the ways through a head -------------------------------------------------------------------------------------
class ByAutograd:
    """Any head."""

    def __init__(self, head: nn.Module, weights: Sequence[Tensor]):
        self.head, self.weights = head, weights
        self.sums: list[Tensor | None] = [None] * len(weights)                        # of the chunks' gradients; None: frozen, or none yet

    def size(self, n_asked: int, n_tokens: int, most: int) -> int:
        """Tokens of a chunk, where so many of so many are asked and a chunk may have `most`."""
        return even_parts(n_asked, most)

    def chunk(self, part: Tensor, target: Tensor, d_part: Tensor, of: Chunk) -> Tensor:
        """(n,D) hidden vectors, (n,) targets -> their loss. The gradient there is written into `d_part`, that of the head is added up."""
        with torch.enable_grad():
            leaf = part.detach().requires_grad_()
            logits = self.head(leaf)
        losses, d_logits = of(target, logits.detach(), logits.size(-1))
        trained = [i for i, w in enumerate(self.weights) if w.requires_grad]
        d_leaf, *new = torch.autograd.grad(logits, [leaf, *(self.weights[i] for i in trained)], d_logits)
        d_part.copy_(d_leaf)
        for i, more in zip(trained, new):
            self.add(i, more)
        return losses.sum()

    def add(self, i: int, more: Tensor) -> None:
        kept = self.sums[i]
        self.sums[i] = more if kept is None else kept.add_(more)

    def gradients(self) -> list[Tensor | None]:
        """Of each weight, in its own type."""
        return self.sums


class ByProducts(ByAutograd):
    """A matrix on a CPU: oneDNN's product, and sums over the chunks that need no room of their own."""

    def chunk(self, part, target, d_part, of):
        weight, bias = self.weights[0], self.weights[1] if len(self.weights) > 1 else None
        losses, d_logits = of(target, one_dnn.linear(part, weight.detach(), bias), len(weight))
        torch.mm(d_logits, weight, out=d_part)
        if weight.requires_grad:
            kept = self.sums[0]
            self.sums[0] = d_logits.t() @ part if kept is None else kept.addmm_(d_logits.t(), part)
        if bias is not None and bias.requires_grad:
            self.add(1, d_logits.sum(0))
        return losses.sum()


class ByTiles(ByAutograd):
    """A matrix on a GPU, in the products' own type, with empty rows up to a whole number of tiles; sums are in fp32."""

    def __init__(self, head: nn.Module, weights: Sequence[Tensor], dtype: torch.dtype):
        super().__init__(head, weights)
        told = [w.detach().to(dtype) for w in weights]
        if spare := -len(weights[0]) % TILE:                                          # torch pads by nothing with a copy
            told = [F.pad(w, (*[0] * (2 * w.ndim - 1), spare)) for w in told]
        self.weight, self.bias = told[0], told[1] if len(told) > 1 else None

    def size(self, n_asked, n_tokens, most):
        self.full = -(-even_parts(n_tokens, most) // LEAST_ROWS) * LEAST_ROWS         # by what the batch holds, not by what is asked this time
        return self.full

    def chunk(self, part, target, d_part, of):
        n, rows = len(part), LEAST_ROWS
        while rows < n:
            rows *= 2
        spare = min(rows, self.full) - n
        x, target = F.pad(part.to(self.weight.dtype), (0, 0, 0, spare)), F.pad(target, (0, spare))
        losses, d_logits = of(target, F.linear(x, self.weight, self.bias), len(self.weights[0]))
        x, d_logits = x[:n], d_logits[:n]
        d_part.copy_(d_logits @ self.weight)
        if self.weights[0].requires_grad:
            self.add(0, d_logits.t() @ x)
        if self.bias is not None and self.weights[1].requires_grad:
            self.add(1, d_logits.sum(0, dtype=torch.float32))
        return losses[:n].sum()

    def add(self, i, more):
        kept = self.sums[i]
        self.sums[i] = more.float() if kept is None else kept.add_(more)

    def gradients(self):
        # Cut in place: what is added to a view of it, as an embedding that is tied to the head does, would be added in new memory.
        return [None if kept is None else kept.resize_(w.shape).to(w.dtype) for kept, w in zip(self.sums, self.weights)]


def way_through(head: nn.Module, x: Tensor, weights: Sequence[Tensor]) -> ByAutograd:
    """The fastest: a matrix that nobody listens to needs no graph."""
    if type(head) is nn.Linear and not head._forward_hooks and not head._forward_pre_hooks:
        mixed = torch.is_autocast_enabled(x.device.type)
        if x.dtype == torch.float32 and one_dnn.serves(head.weight) and not mixed:
            return ByProducts(head, weights)
        if x.is_cuda and type(head.weight) is nn.Parameter:                           # and not a part of one
            return ByTiles(head, weights, torch.get_autocast_dtype("cuda") if mixed else x.dtype)
    return ByAutograd(head, weights)


# ---- the loss --------------------------------------------------------------------------------------------------
class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, targets: Tensor, index: Tensor | None, head: nn.Module, chunk_size: int, plain: Chunk, for_tiles: Chunk,
                *weights: Tensor) -> Tensor:
        asked = hidden if index is None else hidden[index]                            # (M,D)
        through = way_through(head, asked, weights)
        d_asked, total = torch.empty_like(asked), hidden.new_zeros((), dtype=torch.float32)
        size, of = through.size(len(asked), len(hidden), chunk_size), for_tiles if isinstance(through, ByTiles) else plain
        for part, target, d_part in zip(asked.split(size), targets.split(size), d_asked.split(size)):
            total += through.chunk(part, target, d_part, of)
        d_hidden = d_asked
        if index is not None:
            d_hidden = torch.zeros_like(hidden)
            d_hidden[index] = d_asked
        ctx.kept = [d_hidden, *through.gradients()]                                   # the only references: what is added to them is added in place
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        if not ctx.kept:
            raise RuntimeError("the gradients of this loss were asked for a second time; they are worked out in the forward and given once")
        kept, ctx.kept = [None if d is None else d.mul_(grads[0]) for d in ctx.kept], []
        d_hidden, *d_weights = kept
        return d_hidden, *[None] * 6, *d_weights


def chunk_tokens(vocab_size: int, on_gpu: bool = False) -> int:
    """Tokens whose logits take about 64 MiB in fp32; on a GPU, which starts a kernel as slowly for few numbers as for many, 256 MiB in bf16."""
    return max(LEAST_ROWS, min(16384, 2 ** 27 // vocab_size)) if on_gpu else max(64, min(4096, 2 ** 24 // vocab_size))


def even_parts(n: int, most: int) -> int:
    """The size of equal parts of n, as few as can be: a small last one takes nearly as long as a full one."""
    return -(-n // -(-n // most)) if n else most


def token_cross_entropy(hidden: Tensor, targets: Tensor, head: nn.Module, *, chunk_size: int = 1024, label_smoothing: float = 0.0,
                        z_loss: float = 0.0, n_targets: int | None = None, gradient: Gradient = loss_and_gradient) -> tuple[Tensor, int]:
    """Summed loss (nats) of the targets that are not IGNORE_INDEX, and their number: (B,T,D), (B,T) -> scalar, n.

    The sum and not the mean, so that micro-batches and ranks add up to what one batch would have given. `label_smoothing` spreads that share of each
    target over the vocabulary (arXiv:1512.00567, 7); `z_loss` times (log Z)^2 is added (PaLM, arXiv:2204.02311, 5). Who has counted the targets
    already says so (`n_targets`), and nothing waits for a device. `gradient` stands for `loss_and_gradient` where chunks come in few sizes:
    `for_compilers`, compiled.
    """
    flat, wanted = hidden.flatten(0, -2), targets.flatten()
    is_asked = wanted != IGNORE_INDEX
    n = int(is_asked.sum()) if n_targets is None else n_targets
    index = None if n == len(wanted) else torch.nonzero_static(is_asked, size=n).squeeze(1)
    if index is not None:
        wanted = wanted[index]
    weights = list(head.parameters())
    if torch.is_grad_enabled() and (hidden.requires_grad or any(w.requires_grad for w in weights)):
        plain, for_tiles = (partial(told, label_smoothing, z_loss) for told in (loss_and_gradient, gradient))
        return _ChunkedCrossEntropy.apply(flat, wanted, index, head, chunk_size, plain, for_tiles, *weights), n
    total = hidden.new_zeros((), dtype=torch.float32)
    for part, target in zip((flat if index is None else flat[index]).split(chunk_size), wanted.split(chunk_size)):
        logits = head(part).float()
        total = total + F.cross_entropy(logits, target, reduction="sum", label_smoothing=label_smoothing)
        if z_loss:
            total = total + z_loss * logits.logsumexp(-1).square().sum()
    return total, n
