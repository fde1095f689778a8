"""`python -m benchmarks.scaled_exp`: a trial of gradients from hidden states without a separate pass over the logits.

The first GEMM leaves E = exp((z - m) / T) in 16 bits in place of the logits z, and the sums of its rows. What a row's
gradient needs besides is one number a row, f = coef / (T sum): it goes into the operands of the two other GEMMs.

    dweight = -E^T (f h)    and    dhidden = -f (E W)    plus what the sampled tokens add

- m need not be the row's maximum, which nobody knows before the GEMM ends: bfloat16 has as large exponents as float32,
  so that E loses no digits. It is the sampled token's logit, one dot product a row, plus MARGIN: that token has
  E = 2^-MARGIN exactly, the row's sum is 2^-MARGIN / p, and it overflows only if p is below 2^-(128 + MARGIN).
- The sampled token stays out of E and of its sums, `others`. So 1 - p = others / sum has all its digits where p is
  nearly 1; as the difference of a one-hot term and a rounded product it would have none.
- An entropy bonus does not fit: p (log p + entropy) is no product of E and a factor per row. It would take a second
  matrix, E log E, and two more GEMMs. The entropy itself comes out of the epilogue.

It prints the errors against float64 of this, of the kernels as they are (logits in bfloat16, their gradient written
over them), and of E with the sampled token in it: the largest of log-probabilities and entropies, the norms of the
gradients' errors by the gradients', and that of the worst row of dhidden, of those above a millionth of the largest.
Nothing here is part of the package; docs/gpu.md says what it would bring.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

MARGIN = 40.0  # in powers of two
Exponentials = tuple[Tensor, Tensor, Tensor]  # E [N, V]; of its rows, in float32 [N]: sum, and sum of E log2 E


@triton.jit
def scaled_exp_kernel(
    hidden_ptr,  # [N, H]
    weight_ptr,  # [V, H]
    ids_ptr,  # [N]
    level_ptr,  # [N], m in powers of two
    e_ptr,  # out: [N, V]
    sum_ptr,  # out: [tiles of the vocabulary, N]
    weighted_ptr,  # out: likewise
    rate,
    N,
    H: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    STAGES: tl.constexpr,
):
    """GEMM 1 with its epilogue. Programs that follow one another share a tile of the weight, read from memory once."""
    tiles = tl.cdiv(N, ROWS)
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(0) // tiles
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    at_hidden = hidden_ptr + (tl.minimum(row, N - 1)[:, None].to(tl.int64) * H + inner[None, :])
    at_weight = weight_ptr + (tl.minimum(column, V - 1)[None, :].to(tl.int64) * H + inner[:, None])
    z = tl.zeros([ROWS, COLUMNS], tl.float32)
    for _ in tl.range(0, H // INNER, num_stages=STAGES):
        z = tl.dot(tl.load(at_hidden), tl.load(at_weight), z)
        at_hidden += INNER
        at_weight += INNER
    known = row < N
    ids = tl.load(ids_ptr + row, known)
    d = z * rate - tl.load(level_ptr + row, known)[:, None]
    counts = (column[None, :] < V) & (column[None, :] != ids[:, None])
    e = tl.where(counts, tl.exp2(d), 0.0)
    at_e = e_ptr + (row[:, None].to(tl.int64) * V + column[None, :])
    tl.store(at_e, e.to(e_ptr.dtype.element_ty), known[:, None] & (column[None, :] < V))
    tl.store(sum_ptr + tile.to(tl.int64) * N + row, tl.sum(e, 1), known)
    tl.store(weighted_ptr + tile.to(tl.int64) * N + row, tl.sum(tl.where(e > 0, e * d, 0.0), 1), known)


def exponentials_in_triton(hidden: Tensor, weight: Tensor, ids: Tensor, level: Tensor, rate: float) -> Exponentials:
    """For H that is a multiple of 64."""
    (N, H), V = hidden.shape, weight.shape[0]
    rows, columns, inner = 128, 128, 64
    tiles = triton.cdiv(V, columns)
    e = torch.empty(N, V, dtype=hidden.dtype, device=hidden.device)
    sums, weighted = (torch.empty(tiles, N, device=hidden.device) for _ in range(2))
    scaled_exp_kernel[(triton.cdiv(N, rows) * tiles,)](
        hidden, weight, ids, level, e, sums, weighted, rate, N,
        H=H, V=V, ROWS=rows, COLUMNS=columns, INNER=inner, STAGES=3, num_warps=8,
    )  # fmt: skip
    return e, sums.sum(0), weighted.sum(0)


def exponentials_in_torch(hidden: Tensor, weight: Tensor, ids: Tensor, level: Tensor, rate: float) -> Exponentials:
    d = hidden.float() @ weight.float().T * rate - level[:, None]
    e = d.exp2().scatter_(1, ids[:, None], 0.0)
    return e.to(hidden.dtype), e.sum(1), torch.where(e > 0, e * d, 0.0).sum(1)


def product(a: Tensor, b: Tensor) -> Tensor:
    """A 16-bit GEMM with a float32 result."""
    return a.float() @ b.float()


def scaled_exp(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    ids: Tensor,  # [N]
    coef_of: Callable[[Tensor], Tensor],
    temperature: float,
    exponentials: Callable[..., Exponentials] = exponentials_in_torch,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logps [N], entropies [N], dhidden [N, H], dweight [V, H]), float32; coef_of: d(loss)/d(logp) of the logps."""
    rate, own = math.log2(math.e) / temperature, 2.0**-MARGIN
    sampled = weight[ids].float()
    level = (hidden.float() * sampled).sum(1) * rate + MARGIN
    e, others, weighted = exponentials(hidden, weight, ids, level, rate)
    total = others + own
    logps = -torch.log1p(others / own)
    entropies = total.log() - math.log(2) * (weighted - own * MARGIN) / total
    coef = (coef_of(logps) / temperature)[:, None]
    f, hit = coef / total[:, None], coef * (others / total)[:, None]
    dhidden = hit * sampled - f * product(e, weight)
    dweight = -product(e.T, (f * hidden.float()).to(hidden.dtype))
    dweight.index_add_(0, ids, hit * hidden.float())
    return logps, entropies, dhidden, dweight


def softmax_gradients(
    hidden: Tensor, weight: Tensor, ids: Tensor, coef_of: Callable[[Tensor], Tensor], temperature: float, how: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same from logits. how: "exact", "as it is", or "token in E": as above, but for the sampled token."""
    z = hidden @ weight.T if how == "exact" else product(hidden, weight.T)
    z = z.to(hidden.dtype).float() if how == "as it is" else z
    logp = (z / temperature).log_softmax(1)
    p = logp.exp()
    logps = logp.gather(1, ids[:, None])[:, 0]
    coef = (coef_of(logps) / temperature)[:, None]
    one_hot = torch.zeros_like(p).scatter_(1, ids[:, None], 1.0)
    if how == "token in E":
        e = (logp - logp.amax(1, keepdim=True)).exp().to(hidden.dtype)
        f = coef * p.amax(1, keepdim=True)
        dweight = product(one_hot.T, coef * hidden) - product(e.T, (f * hidden.float()).to(hidden.dtype))
        return logps, -(p * logp).sum(1), coef * weight[ids].float() - f * product(e, weight), dweight
    dz = coef * (one_hot - p)
    exactly = coef * -torch.expm1(logps)[:, None]  # as the kernels do: 1 - p has no digits where p is nearly 1
    dz = dz.scatter(1, ids[:, None], exactly).to(hidden.dtype)
    multiply = torch.matmul if how == "exact" else product
    return logps, -(p * logp).sum(1), multiply(dz, weight), multiply(dz.T, hidden)


def case(spread: float, *, N: int = 256, H: int = 128, V: int = 4096) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and weight in bfloat16, ids sampled from their softmax, and a coefficient for each token."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=g).bfloat16()
    weight = (torch.randn(V, H, generator=g) * spread / math.sqrt(H)).bfloat16()
    ids = torch.multinomial(product(hidden, weight.T).softmax(1), 1, generator=g)[:, 0]
    return hidden, weight, ids, torch.randn(N, generator=g) / N


def main() -> None:
    print(
        f"{'logits':>8}{'mean p':>8}  {'':12}{'logp':>10}{'entropy':>10}{'dhidden':>10}{'dweight':>10}{'worst row':>11}"
    )
    for spread in (1.0, 3.0, 10.0, 20.0):
        hidden, weight, ids, coef = case(spread)
        double = hidden.double(), weight.double(), ids, lambda logps, coef=coef: coef.double(), 0.9
        exact = softmax_gradients(*double, "exact")
        args = hidden, weight, ids, lambda logps, coef=coef: coef, 0.9
        found = {how: softmax_gradients(*args, how) for how in ("as it is", "token in E")}
        found["scaled exp"] = scaled_exp(*args)
        for how, results in found.items():
            pairs = list(zip(results, exact))
            errors = [(a - b).abs().max().item() for a, b in pairs[:2]]
            errors += [((a - b).norm() / b.norm()).item() for a, b in pairs[2:]]
            by_row, norms = (pairs[2][0] - pairs[2][1]).norm(dim=1), pairs[2][1].norm(dim=1)
            errors.append((by_row / norms)[norms > 1e-6 * norms.max()].max().item())
            print(f"{spread:8}{exact[0].exp().mean():8.3f}  {how:12}" + "".join(f"{error:10.1e}" for error in errors))


if __name__ == "__main__":
    main()
