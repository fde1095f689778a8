"""The `cuda` backend: csrc/grpo_cuda.cu through ctypes. CUDA devices from compute capability 8.0 on; 32 and 16 bits.

From compute capability 9.0 on, a thread-block cluster holds a row in its shared memory: the logits are read once and
the gradient is written once. Rows that are not 16-byte aligned, or too long, and older devices take the two-phase
kernels of the same file. cuda_build.py compiles the library at first use. The three functions are `dispatch.Backend`'s.
"""

from __future__ import annotations

import ctypes
import math
import warnings

import torch
from torch import Tensor

from mr1fast.kernels import cuda_build, reference
from mr1fast.kernels.advantages import SCALE_REWARDS
from mr1fast.kernels.reference import NUMBERS, SWITCHES, LogitMap, LossBatch, LossSpec, Outputs

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# fmt: off
_POINTERS = (
    "logits", "grad", "ids", "mask", "advantages", "rewards", "advantage_space", "old_logps", "ref_logps",
    "is_ratio", "token_weight", "entropy_weight", "beta", "epsilon_low", "epsilon_high", "temperatures", "share",
    "loss", "logps", "entropies", "kl", "coef", "lse", "is_low", "is_high", "grad_logps", "grad_entropies",
)
_SIZES = (
    "B", "L", "V", "logits_stride_b", "logits_stride_l", "grad_stride_b", "grad_stride_l", "advantage_stride_b",
    "advantage_stride_l", "is_ratio_stride_b", "is_ratio_stride_l", "weight_stride_b", "weight_stride_l",
    "beta_stride_b", "beta_stride_l", "epsilon_low_stride_b", "epsilon_low_stride_l", "epsilon_high_stride_b",
    "epsilon_high_stride_l",
    "num_generations",
)
_INTS = ("dtype", "scale_rewards", "two_phase")
# fmt: on


class TokenSpec(ctypes.Structure):
    """TokenSpec of csrc/token_loss.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in SWITCHES),
        *((name, ctypes.c_float) for name in NUMBERS),
    )


class RowsCall(ctypes.Structure):
    """Mr1RowsCall of csrc/grpo_cuda.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("spec", TokenSpec),
        *((name, ctypes.c_float) for name in ("inv_temperature", "rate", "softcap")),
        *((name, ctypes.c_int32) for name in _INTS),
    )


# ---- the library ----------------------------------------------------------------------------------------------------


def open_library(path: str) -> ctypes.CDLL:
    library = ctypes.CDLL(path)
    library.mr1_sizeof_call.restype = ctypes.c_int64
    assert library.mr1_sizeof_call() == ctypes.sizeof(RowsCall), f"{path} was built from other sources"
    for name in ("mr1_grpo_forward", "mr1_score_forward", "mr1_score_backward"):
        function = getattr(library, name)
        function.argtypes = (ctypes.POINTER(RowsCall), ctypes.c_void_p)
        function.restype = ctypes.c_char_p
    library.mr1_grpo_path.argtypes = (ctypes.POINTER(RowsCall),)
    library.mr1_grpo_path.restype = ctypes.c_char_p
    return library


_LOADED: dict[int, ctypes.CDLL | str] = {}


def _load(device: int) -> ctypes.CDLL | str:
    """The library for that device, or the reason why there is none; determined once per device."""
    if device not in _LOADED:
        _LOADED[device] = _find(*torch.cuda.get_device_capability(device), device)
    return _LOADED[device]


def _find(major: int, minor: int, device: int) -> ctypes.CDLL | str:
    if major < 8:
        return f"it needs compute capability 8.0 or more, the device has {major}.{minor}"
    try:
        return open_library(str(cuda_build.build(device, cuda_build.architecture(major, minor))))
    except (cuda_build.CannotBuild, OSError) as error:
        warnings.warn(f"mr1fast: no backend='cuda' here: {error}", stacklevel=2)
        return str(error)


def use(library: ctypes.CDLL, device: int) -> None:
    """Make calls on that device use this library."""
    _LOADED[device] = library


def _missing(device: int) -> str | None:
    loaded = _load(device)
    return loaded if isinstance(loaded, str) else None


# Does what torch.compiler.assume_constant_result does, without importing the compiler, which takes two seconds.
_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def why_not(logits: Tensor) -> str | None:
    if not logits.is_cuda:
        return f"it needs a CUDA device, the logits are on {logits.device}"
    if logits.dtype not in DTYPES:
        return f"it supports float32, bfloat16 and float16 logits, got {logits.dtype}"
    if logits.shape[-1] == 0:
        return "the vocabulary is empty"
    return _missing(logits.get_device())


def _library(logits: Tensor) -> ctypes.CDLL:
    loaded = _load(logits.get_device())
    assert not isinstance(loaded, str), loaded
    return loaded


# ---- a call ---------------------------------------------------------------------------------------------------------


class _Call:
    """A RowsCall and the tensors its pointers belong to."""

    def __init__(self, logits: Tensor, ids: Tensor, mask: Tensor | None, logit_map: LogitMap, grad: Tensor | None):
        reference.check_ids(ids, mask, logits.shape[-1])
        if logits.stride(-1) != 1 and logits.shape[-1] > 1:
            assert grad is not logits
            logits = logits.contiguous()
        self.logits = logits
        self.kept: list[Tensor] = []
        self.c = RowsCall(softcap=logit_map.softcap, dtype=DTYPES[logits.dtype])
        self.c.inv_temperature = 1 / logit_map.temperature
        self.c.rate = math.log2(math.e) / logit_map.temperature
        self.c.B, self.c.L, self.c.V = logits.shape
        self.rows("logits", logits)
        if grad is not None:
            self.rows("grad", grad)
        self.contiguous(ids=ids, mask=mask, temperatures=logit_map.temperatures)

    def rows(self, name: str, tensor: Tensor) -> None:
        """A [B, L, V] tensor whose last stride is 1."""
        assert tensor.stride(-1) == 1 or tensor.shape[-1] == 1
        setattr(self.c, name, tensor.data_ptr())
        setattr(self.c, f"{name}_stride_b", tensor.stride(0))
        setattr(self.c, f"{name}_stride_l", tensor.stride(1))

    def strided(self, name: str, stride: str, tensor: Tensor | None) -> None:
        """A [B, L] float32 tensor, perhaps expanded; or None."""
        if tensor is not None:
            setattr(self.c, name, tensor.data_ptr())
            setattr(self.c, f"{stride}_stride_b", tensor.stride(0))
            setattr(self.c, f"{stride}_stride_l", tensor.stride(1))

    def contiguous(self, **tensors: Tensor | None) -> None:
        for name, tensor in tensors.items():
            if tensor is not None:
                tensor = tensor.contiguous()
                self.kept.append(tensor)
                setattr(self.c, name, tensor.data_ptr())

    def outputs(self, *names: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """New [B, L] tensors, their pointers set."""
        tensors = [torch.empty((self.c.B, self.c.L), dtype=dtype, device=self.logits.device) for _ in names]
        self.contiguous(**dict(zip(names, tensors)))
        return tensors

    def run(self, function: str) -> None:
        if self.c.B * self.c.L == 0:
            return
        with torch.cuda.device_of(self.logits):
            stream = torch.cuda.current_stream().cuda_stream if self.logits.is_cuda else None
            wrong = getattr(_library(self.logits), function)(self.c, stream)
        if wrong is not None:
            raise RuntimeError(f"{function}: {wrong.decode()}")


def grpo_forward(logits: Tensor, batch: LossBatch, spec: LossSpec, grad: Tensor | None) -> Outputs:
    """See `dispatch.Backend`."""
    assert spec.importance_sampling_level == "token"
    call = _Call(logits, batch.ids, batch.mask, LogitMap.of(batch, spec), grad)
    call.strided("advantages", "advantage", batch.advantages)
    call.strided("is_ratio", "is_ratio", batch.is_ratio)
    call.strided("token_weight", "weight", batch.token_weight)
    call.contiguous(old_logps=batch.old_logps, ref_logps=batch.ref_logps)
    call.strided("beta", "beta", batch.beta.expand(batch.ids.shape))
    call.strided("epsilon_low", "epsilon_low", batch.epsilons_low)
    call.strided("epsilon_high", "epsilon_high", batch.epsilons_high)
    call.contiguous(entropy_weight=batch.entropy_weight)
    if batch.advantages is None:
        assert batch.rewards is not None
        call.contiguous(rewards=batch.rewards, advantage_space=torch.empty_like(batch.rewards))
        call.c.num_generations = batch.num_generations
        call.c.scale_rewards = SCALE_REWARDS.index(batch.scale_rewards)
    call.c.spec = TokenSpec(*spec.switches, *spec.numbers)
    names = ("share", "loss", "logps", "entropies", "coef")
    share, per_token_loss, logps, entropies, coef = call.outputs(*names)
    kl = None if batch.ref_logps is None else call.outputs("kl")[0]
    is_low, is_high = call.outputs("is_low", "is_high", dtype=torch.bool)
    call.run("mr1_grpo_forward")
    return share.sum(), per_token_loss, logps, entropies, kl, is_low, is_high, coef


def score_forward(
    logits: Tensor, ids: Tensor, mask: Tensor | None, logit_map: LogitMap
) -> tuple[Tensor, Tensor, Tensor]:
    """(logps, entropies, lse), float32 [B, L], 0 where masked."""
    call = _Call(logits, ids, mask, logit_map, None)
    logps, entropies, lse = call.outputs("logps", "entropies", "lse")
    call.run("mr1_score_forward")
    return logps, entropies, lse


def score_backward(
    logits: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    lse: Tensor,
    entropies: Tensor,
    grad_logps: Tensor,
    grad_entropies: Tensor | None,
    logit_map: LogitMap,
    grad: Tensor,
) -> None:
    call = _Call(logits, ids, mask, logit_map, grad)
    call.contiguous(lse=lse, entropies=entropies, grad_logps=grad_logps, grad_entropies=grad_entropies)
    call.run("mr1_score_backward")
