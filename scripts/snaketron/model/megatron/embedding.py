"""The gradient of the embeddings, added where the gradients of a step are.

PyTorch makes a gradient of the whole table out of zeros, which is then added to that of the micro-batches
before: 1.0 ms a micro-batch on an H200 for 131,072 tokens and a width of 2,688. Multi-token prediction uses
the table twice: 3.0 ms for a width of 4,096. A micro-batch has far fewer tokens than the table has rows, so
here only the rows that occur are read and written.
"""

# Triton gives the parameters of a kernel their types when it compiles it.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows of a token's gradient that one program adds up at once, and numbers of each.
ROWS, COLUMNS = 8, 1024
WARPS = 4


class Embedding(torch.autograd.Function):
    """Rows (..., width) of weight (tokens, width), whose gradient is added to `weight.main_grad`.

    autograd gets no gradient of the weight: a placeholder would be added up as large as the table.
    """

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(ids)
        return torch.nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:  # type: ignore[override]
        [ids] = ctx.saved_tensors
        add_rows(ctx.weight.main_grad, ids, grad)
        ctx.weight.grad_added_to_main_grad = True
        return None, None


def add_rows(total: Tensor, ids: Tensor, grad: Tensor) -> None:
    """total[ids] += grad, added up in fp32, in one order.

    Args:
        total: (tokens, width), contiguous.
        ids: (...), integers.
        grad: (..., width).
    """
    width = total.shape[1]
    rows = grad.reshape(-1, width).contiguous()
    ordered, order = torch.sort(ids.flatten().int(), stable=True)
    _add_rows[(len(order), triton.cdiv(width, COLUMNS))](
        ordered, order, rows, total, len(order), width, ROWS, COLUMNS, num_warps=WARPS
    )


@triton.jit
def _add_rows(ids, order, grad, total, count, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A program for each occurrence of a token; the program of the first occurrence does the work."""
    first = tl.program_id(0)
    token = tl.load(ids + first)
    before = tl.load(ids + first - 1, mask=first > 0, other=-1)
    if token != before:
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < width
        sums = tl.zeros((COLUMNS,), tl.float32)
        at, found = first, tl.full((), ROWS, tl.int32)
        while found == ROWS:
            row = at + tl.arange(0, ROWS)
            same = tl.load(ids + row, mask=row < count, other=-1) == token
            place = tl.load(order + row, mask=same, other=0) * width
            mask = same[:, None] & inside[None, :]
            x = tl.load(grad + place[:, None] + column[None, :], mask=mask, other=0.0)
            sums += tl.sum(x.to(tl.float32), 0)
            found = tl.sum(same.to(tl.int32), 0)
            at += ROWS
        out = total + token.to(tl.int64) * width + column
        sums += tl.load(out, mask=inside, other=0.0).to(tl.float32)
        tl.store(out, sums.to(total.dtype.element_ty), mask=inside)
