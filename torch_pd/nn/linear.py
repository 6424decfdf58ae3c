"""Linear layers: one function for all, and several of them merged into one matrix."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from torch_pd import ops
from torch_pd.weights.source import Matrix

if TYPE_CHECKING:
    from torch_pd.nn.attention import Pass


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """``x [..., in] @ weight [out, in].T + bias [out]``.

    On CPU the library's own op: a row of the result does not depend on the other rows, so batching
    never changes an answer. Elsewhere the vendor's GEMM.

    Args:
        out: ``[T, out]`` for ``x [T, in]``; rows may lie apart.
    """
    if not x.is_cpu:
        if out is None:
            return nn.functional.linear(x, weight, bias)
        if bias is None:
            return torch.mm(x, weight.t(), out=out)
        return torch.addmm(bias, x, weight.t(), out=out)
    if x.dim() != 2:
        rows = linear(x.reshape(-1, x.shape[-1]), weight, bias)
        return rows.view(*x.shape[:-1], weight.shape[0])
    if out is None:
        out = x.new_empty(x.shape[0], weight.shape[0])
    ops.linear(x, weight, bias, out)
    return out


def in_rows(tensor: Tensor) -> bool:
    """Whether a weight lies in memory as numbers, row by row: a quantised one of a class of its own
    does not, nor one that is sparse or transposed."""
    plain = type(tensor.data) is Tensor and tensor.layout is torch.strided
    return plain and tensor.stride(-1) == 1


def head_forward(module: nn.Linear, x: Tensor) -> Tensor:
    """Stands in for the forward of the model's head, ``x [..., hidden]`` to ``[..., vocab]``."""
    running: Pass = module.__dict__["_torch_pd"]
    rows = x.shape[:-1].numel()
    if running.logits is None or module.bias is not None or x.is_cpu:
        return linear(x, module.weight, module.bias)
    out = torch.mm(x.reshape(rows, -1), module.weight.t(), out=running.logits[:rows])
    return out.view(*x.shape[:-1], -1)


def linear_in_parts(x: Tensor, matrix: Matrix, bias: Tensor | None = None) -> Tensor:
    """``x [T, in] @ matrix [out, in].T + bias [out]``, one GEMM for each part of the matrix.

    Parts of the rows fill columns of the result. Parts of the columns are added up in the dtype of
    ``x``, so their result is rounded once more for each.
    """
    if len(matrix.parts) == 1:
        return linear(x, matrix.parts[0], bias)
    sizes = [part.shape[matrix.axis] for part in matrix.parts]
    if matrix.axis == 0:
        y = x.new_empty(x.shape[0], sum(sizes))
        biases = [None] * len(sizes) if bias is None else bias.split(sizes)
        for part, columns, own in zip(matrix.parts, y.split(sizes, 1), biases, strict=True):
            linear(x, part, own, columns)
        return y
    y = linear(x[:, : sizes[0]], matrix.parts[0], bias)
    for part, columns in zip(matrix.parts[1:], x.split(sizes, 1)[1:], strict=True):
        if x.is_cpu:
            y += linear(columns, part)
        else:
            y.addmm_(columns, part.t())
    return y


class MergedLinear:
    """Linears of one input as one matrix ``weight [sum of out, in]``, in the given order.

    The modules stay, their Parameters become views of the merged matrix: names, values and
    identities are unchanged and nothing is stored twice. One linear alone is used as it is, and so
    are linears that lie behind each other in one storage already (as the loader puts them).
    """

    merges: ClassVar[int] = 0
    """How often any was merged."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self.linears = list(linears)
        self.weight: Tensor
        self.bias: Tensor | None
        self.merge()

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def merge(self) -> None:
        """Merges what the modules hold now; to be called after their storage was replaced."""
        MergedLinear.merges += 1
        self.weight = _merge([module.weight for module in self.linears])
        # All have a bias or none.
        biased = self.linears[0].bias is not None
        self.bias = _merge([module.bias for module in self.linears]) if biased else None

    def mend(self) -> None:
        """Merges again if a module has other storage than the merged matrix has for it."""
        torn = False
        for own, merged in (("weight", self.weight), ("bias", self.bias)):
            if merged is None or merged.is_meta:
                continue
            at = merged.data_ptr()
            for module in self.linears:
                if own not in module._parameters:
                    raise ValueError(
                        f"the {own} of a fused layer is no Parameter of its linear any more (a "
                        "parametrization?): call torch_pd.unpatch_model before such a change, and "
                        "patch_model again after it"
                    )
                parameter = module._parameters[own]
                torn |= parameter is None or parameter.data_ptr() != at
                at += 0 if parameter is None else parameter.nbytes
        if torn:
            self.merge()

    def places(self) -> list[tuple[dict[str, nn.Parameter | None], str]]:
        """Where the Parameters are that must be views of the merged matrix: dict and key."""
        names = ("weight",) if self.bias is None else ("weight", "bias")
        return [(module._parameters, name) for name in names for module in self.linears]

    def split(self) -> None:
        """Gives every module storage of its own again."""
        if len(self.linears) > 1:
            for module in self.linears:
                for parameter in module.parameters():
                    parameter.data = parameter.data.clone()


def _merge(parameters: list[Tensor]) -> Tensor:
    if len(parameters) == 1:
        return parameters[0].data
    adjacent = _adjacent([parameter.data for parameter in parameters])
    if adjacent is not None:
        return adjacent
    with torch.no_grad():
        merged = torch.cat([parameter.data for parameter in parameters])
    for parameter, part in zip(
        parameters, merged.split([p.shape[0] for p in parameters]), strict=True
    ):
        parameter.data = part
    return merged


def _adjacent(parts: list[Tensor]) -> Tensor | None:
    """The parts as one tensor, if they are contiguous and follow each other in one storage."""
    first = parts[0]
    if first.is_meta:
        return None
    end = first.storage_offset()
    for part in parts:
        if (
            not part.is_contiguous()
            or part.dtype != first.dtype
            or part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
            or part.storage_offset() != end
        ):
            return None
        end += part.numel()
    rows = sum(part.shape[0] for part in parts)
    return first.as_strided((rows, *first.shape[1:]), first.stride())
