"""All that is changed in transformers but for layers that are exchanged (patches.py, liger.py), and only within these
contexts; tested with transformers 5.23.

- `ALL_ATTENTION_FUNCTIONS` has two implementations more. `mr1fast_shared_prefix` is the language model's: it takes the
  layout of the row from the keyword `shared_prefix`, which the models hand on to their attention. The vision tower's
  is the same function under another name, because transformers tells where its images and windows begin
  (`cu_seq_lens_q`) to implementations with "flash" in their name alone, and calls others once for each.
- `config._attn_implementation`, of the two parts of a model, names these.
- `GradientCheckpointingLayer` checkpoints in training mode only, which is switched on for the layers and not for what
  is in them: there would be dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from mr1fast.model.varlen import SharedPrefix, attention, kernel_for

LANGUAGE, VISION = "mr1fast_shared_prefix", "mr1fast_flash_segments"
EAGER = "_eager"  # appended where the model's own implementation is eager


@contextmanager
def attention_of(config: Any, name: str) -> Iterator[None]:
    """Within the context the layers with this configuration attend by the function of that name."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def shared_attention(model: Any) -> Iterator[None]:
    """Within the context the model (not a PeftModel: its base) takes the keyword `shared_prefix`, a SharedPrefix."""
    language, vision = model.config.get_text_config(), model.config.vision_config
    suffix = EAGER if language._attn_implementation == "eager" else ""
    with attention_of(language, LANGUAGE + suffix), attention_of(vision, VISION + suffix):
        yield


@contextmanager
def checkpointed(
    model: nn.Module, *, on: bool, within: Callable[[], AbstractContextManager[None]] = nullcontext
) -> Iterator[None]:
    """Within the context, if `on`, each layer runs again in backward instead of keeping its activations.

    within: the contexts in which it runs again.
    """
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not (on and torch.is_grad_enabled()):
        layers = []
    for layer in layers:
        layer.gradient_checkpointing, layer.training = True, True
        layer._gradient_checkpointing_func = partial(
            checkpoint,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing is random
            context_fn=lambda: (nullcontext(), within()),
        )
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing, layer.training = False, False


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    eager: bool,
    shared_prefix: SharedPrefix,
    cu_seq_lens_q: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls with query, key and value [1, heads, T, D]; the output is [1, T, heads, D]."""
    layout = shared_prefix
    if cu_seq_lens_q is not None:  # of images, or of windows in them
        layout = SharedPrefix(0, shared_prefix.images(tuple(cu_seq_lens_q.diff().tolist()), query.device))
    kernel = kernel_for(query.device, query.dtype, eager=eager)
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    layer = getattr(module, "layer_idx", None)  # the vision tower's have no number
    return attention(query, key, value, layout, kernel, scaling, layer)[None], None


for _name in (LANGUAGE, VISION):
    AttentionInterface.register(_name, partial(_attend, eager=False))
    AttentionInterface.register(_name + EAGER, partial(_attend, eager=True))
