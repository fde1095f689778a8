"""What is the policy? A Qwen2-VL or Qwen2.5-VL, its processor, its prompts, and how it completes them."""

from mr1fast.model.load import load_model, load_processor
from mr1fast.model.policy import Policy
from mr1fast.model.prompts import encode_prompts
from mr1fast.model.rollout import Rollout, Sampler

__all__ = ["Policy", "Rollout", "Sampler", "encode_prompts", "load_model", "load_processor"]
