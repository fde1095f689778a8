"""The processor of Qwen2-VL and Qwen2.5-VL for text and images, on machines with and without torchvision."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2VLProcessor
from transformers.processing_utils import ProcessorMixin

from mr1fast.options.prompt import Prompt


class Qwen2VLTextImageProcessor(Qwen2VLProcessor):
    """`Qwen2VLProcessor` without its video half, the only part that cannot do without torchvision.

    Same files, same inputs and outputs: what it saves is read by `AutoProcessor` where torchvision is installed. (Where
    it is not, `AutoProcessor` returns the tokenizer alone, and `Qwen2VLProcessor` does not load.) Pass it as
    `processing_class` to train Qwen2-VL with TRL on such a machine.
    """

    prompt = Prompt()  # in which questions are put to the model

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token = "<|image_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token = "<|video_pad|>"
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template, **kwargs)

    def to_dict(self, *args, **kwargs) -> dict[str, Any]:
        return {**super().to_dict(*args, **kwargs), "processor_class": "Qwen2VLProcessor"}
