"""A Qwen2-VL of a few thousand random weights, and prompts for it, made by hand."""

import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mr1fast.make_embedded import CHAT_TEMPLATE
from mr1fast.model.policy import Policy
from mr1fast.model.processor import Qwen2VLTextImageProcessor

EOS, PAD, START, END, IMAGE, VIDEO = 60, 61, 56, 57, 58, 59
VOCABULARY = 64
SPECIAL = {
    EOS: "<|im_end|>",
    PAD: "<|endoftext|>",
    START: "<|vision_start|>",
    END: "<|vision_end|>",
    IMAGE: "<|image_pad|>",
    VIDEO: "<|video_pad|>",
}


def tiny_processor() -> Qwen2VLTextImageProcessor:
    """A tokenizer of words w0, w1, ... and Qwen2-VL's special tokens."""
    words = {SPECIAL.get(i, f"w{i}"): i for i in range(VOCABULARY)}
    backend = Tokenizer(WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.add_tokens([AddedToken(token, special=True) for token in SPECIAL.values()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SPECIAL[EOS], pad_token=SPECIAL[PAD])
    return Qwen2VLTextImageProcessor(Qwen2VLImageProcessorPil(patch_size=4), tokenizer, chat_template=CHAT_TEMPLATE)


def tiny_policy(model: Qwen2VLForConditionalGeneration) -> Policy:
    return Policy(model, tiny_processor())


def tiny_model(seed=0, attention="sdpa", tied=True, window=None) -> Qwen2VLForConditionalGeneration:
    """window: of the second layer's attention, in tokens."""
    torch.manual_seed(seed)
    sliding = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1} if window else {}
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            "initializer_range": 0.3,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
            "bos_token_id": None,
            "tie_word_embeddings": tied,
            **sliding,
        },
        vision_config={
            "depth": 1,
            "embed_dim": 16,
            "num_heads": 2,
            "hidden_size": 32,
            "patch_size": 4,
            "initializer_range": 0.3,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=tied,
    )
    config._attn_implementation = attention
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD, do_sample=False)
    return model.eval()


def tiny_inputs(seed=1) -> dict[str, torch.Tensor]:
    """Four prompts padded on the left: images of 2 x 2 and 2 x 4 tokens, one text without image, another image."""
    rng = torch.Generator().manual_seed(seed)
    grids = [(1, 4, 4), (1, 4, 8), None, (1, 8, 4)]
    rows, pixels = [], []
    for grid, length in zip(grids, (3, 5, 9, 2)):
        text = torch.randint(0, 50, (length,), generator=rng).tolist()
        if grid is None:
            rows.append(text)
            continue
        patches = grid[1] * grid[2]
        rows.append([1, START, *[IMAGE] * (patches // 4), END, *text])
        pixels.append(torch.randn(patches, 3 * 2 * 4 * 4, generator=rng))
    T = max(map(len, rows))
    ids = torch.tensor([[PAD] * (T - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": (ids == IMAGE).long(),
        "pixel_values": torch.cat(pixels),
        "image_grid_thw": torch.tensor([grid for grid in grids if grid]),
    }


def joined(inputs, completion_ids, completion_mask, num_generations):
    """Prompt and completion as one sequence each, every image repeated: what a plain forward takes."""
    G = num_generations
    ids, mask, types = (inputs[k].repeat_interleave(G, 0) for k in ("input_ids", "attention_mask", "mm_token_type_ids"))
    patches = inputs["image_grid_thw"].prod(1).tolist()
    images = [image for image in inputs["pixel_values"].split(patches) for _ in range(G)]
    return {
        "input_ids": torch.cat([ids, completion_ids], 1),
        "attention_mask": torch.cat([mask, completion_mask.long()], 1),
        "mm_token_type_ids": torch.cat([types, torch.zeros_like(completion_ids)], 1),
        "pixel_values": torch.cat(images),
        "image_grid_thw": inputs["image_grid_thw"].repeat_interleave(G, 0),
    }
