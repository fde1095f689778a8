"""What is the policy: a Qwen2-VL, its processor, its prompts, and how it completes them."""

from mr1fast.model.load import encode_prompts, load_model, load_processor

__all__ = ["encode_prompts", "load_model", "load_processor"]
