"""The same model, put together for inference on CPUs: one matrix for q, k and v, one for gate and up, and oneDNN's kernel.

`F.linear` (MKL) streams the weights of a few rows at half of what the memory gives, and multiplies many rows a tenth slower than oneDNN's kernel
(nn/one_dnn.py) does. Lowered modules share the weights of the model that they come from: matrices that lie side by side are viewed as one, others are
copied. Tested equal to the plain modules, which stay the oracle.
B batch, T positions, D d_model, H and G heads, K d_head.
"""
from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hanok.nn import one_dnn
from hanok.nn.attention import Append, SelfAttention, attend
from hanok.nn.layers import GatedMLP, PostNorm, PreNorm
from hanok.nn.masks import Frame
from hanok.nn.position import rotate


class StreamLinear(nn.Module):
    """A linear layer by oneDNN's kernel, or torch's where that is not there: (...,in) -> (...,out)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, by_one_dnn: bool):
        super().__init__()
        self.weight, self.bias, self.by_one_dnn = weight, bias, by_one_dnn

    def forward(self, x: Tensor) -> Tensor:
        if self.by_one_dnn:
            return one_dnn.linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


class FusedSelfAttention(nn.Module):
    """SelfAttention with one projection for queries, keys and values."""

    def __init__(self, plain: SelfAttention, linear: Callable[[Sequence[nn.Linear]], StreamLinear]):
        super().__init__()
        self.qkv, self.out_proj = linear([plain.q_proj, plain.k_proj, plain.v_proj]), linear([plain.out_proj])
        self.q_norm, self.k_norm = apart(plain.q_norm), apart(plain.k_norm)
        self.d_head, self.n_kv_heads, self.scale = plain.d_head, plain.n_kv_heads, plain.scale
        self.n_heads = plain.q_proj.out_features // plain.d_head
        self.normed = not (isinstance(plain.q_norm, nn.Identity) and isinstance(plain.k_norm, nn.Identity))

    def forward(self, x: Tensor, frame: Frame, append: Append | None = None) -> Tensor:   # (B,T,D) -> (B,T,D)
        qkv = self.qkv(x).unflatten(-1, (-1, self.d_head)).transpose(1, 2)            # (B,H+2G,T,K)
        v = qkv[:, -self.n_kv_heads:]
        q, k = self.positioned(qkv, frame.rotation)
        if append is not None:
            k, v = append(k, v)
        return self.out_proj(attend(q, k, v, frame.mask, frame.is_causal, self.scale).transpose(1, 2).flatten(2))

    def positioned(self, qkv: Tensor, rotation: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        qk = qkv[:, :-self.n_kv_heads]                                                # (B,H+G,T,K): both turn in one go
        if self.normed:
            qk = torch.cat([self.q_norm(qk[:, :self.n_heads]), self.k_norm(qk[:, self.n_heads:])], 1)
        if rotation is not None:
            qk = rotate(qk, rotation)
        return qk[:, :self.n_heads], qk[:, self.n_heads:]


class FusedGatedMLP(nn.Module):
    """GatedMLP with one projection for gate and up."""

    def __init__(self, plain: GatedMLP, linear: Callable[[Sequence[nn.Linear]], StreamLinear]):
        super().__init__()
        self.gate_up, self.down = linear([plain.gate, plain.up]), linear([plain.down])
        self.activation = nn.SiLU(inplace=True) if type(plain.activation) is nn.SiLU else apart(plain.activation)

    def forward(self, x: Tensor) -> Tensor:                                           # (B,T,D) -> (B,T,D)
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(self.activation(gate).mul_(up))


class LeanRMSNorm(nn.Module):
    """RMSNorm in one pass that reads and two that write; torch's own CPU version takes five."""

    def __init__(self, plain: nn.RMSNorm, eps: float):
        super().__init__()
        self.weight, self.width, self.eps = nn.Parameter(plain.weight.detach(), False), plain.normalized_shape[0], eps

    def forward(self, x: Tensor) -> Tensor:                                           # (...,D) -> (...,D)
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        return x.mul(squares.div_(self.width).add_(self.eps).rsqrt_()).mul_(self.weight)


class LeanResidual(nn.Module):
    """PreNorm and PostNorm that add into what the sublayer has just made."""

    def __init__(self, before: nn.Module, after: nn.Module):
        super().__init__()
        self.before, self.after = before, after

    def forward(self, x: Tensor, sublayer: nn.Module, *args) -> Tensor:
        return self.after(sublayer(self.before(x), *args).add_(x))


def apart(module: nn.Module, child: Callable[[nn.Module], nn.Module] | None = None) -> nn.Module:
    """Another object with the same weights but no gradients, its parts made by `child`: what is set or hooked on one is not seen on the other."""
    new = copy.copy(module)
    vars(new).update({name: value.copy() for name, value in vars(module).items() if isinstance(value, dict)})
    new._parameters = {name: None if weight is None else nn.Parameter(weight.detach(), False) for name, weight in module._parameters.items()}
    new._modules = {name: part if part is None else (child or apart)(part) for name, part in module._modules.items()}
    return new


def side_by_side(tensors: Sequence[Tensor]) -> Tensor | None:
    """The matrices as one matrix of all their rows, without a copy, where they lie side by side in one storage; else None."""
    first = tensors[0]
    place = first.storage_offset()
    for tensor in tensors:
        same_storage = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same_storage and tensor.is_contiguous() and tensor.storage_offset() == place and tensor.dtype == first.dtype):
            return None
        place += tensor.numel()
    return torch.as_strided(first, (sum(tensor.size(0) for tensor in tensors), *first.shape[1:]), first.stride(), first.storage_offset())


def joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """All rows as one tensor: a view where that is possible, else a copy."""
    present = [tensor.detach() for tensor in tensors if tensor is not None]
    if not present:
        return None
    view = side_by_side(present)
    return torch.cat(present) if view is None else view


def lower(model: nn.Module, rows: int = 1) -> nn.Module:
    """A model for inference that shares `model`'s weights and computes the same. Elsewhere than on an fp32 CPU the kernels stay torch's.

    For more than one of `rows` that step together, matrices are copied into oneDNN's blocked layout: 4 to 16 rows then take 0.7 of the time.
    """
    weight = next(model.parameters())
    fp32_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    by_one_dnn = one_dnn.serves(weight)

    def linear(parts: Sequence[nn.Linear]) -> StreamLinear:
        merged = joined([part.weight for part in parts])
        assert merged is not None
        if by_one_dnn and rows > 1:
            merged = torch.ops.mkldnn._reorder_linear_weight(merged, rows)
        return StreamLinear(merged, joined([part.bias for part in parts]), by_one_dnn)

    def replaced(module: nn.Module) -> nn.Module:
        if type(module) is SelfAttention:
            return FusedSelfAttention(module, linear)
        if type(module) is GatedMLP:
            return FusedGatedMLP(module, linear)
        if type(module) is nn.Linear:
            return linear([module])
        if fp32_cpu and type(module) is nn.RMSNorm and module.eps and module.elementwise_affine and len(module.normalized_shape) == 1:
            return LeanRMSNorm(module, module.eps)
        if type(module) is PreNorm:
            return LeanResidual(replaced(module.norm), nn.Identity())
        if type(module) is PostNorm:
            return LeanResidual(nn.Identity(), replaced(module.norm))
        return apart(module, lambda part: seen.setdefault(id(part), replaced(part)))

    seen: dict[int, nn.Module] = {}
    return replaced(model).eval()
