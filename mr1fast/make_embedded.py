"""Make the embedded model again: `python -m mr1fast.make_embedded [--output DIR]` (on a CPU, in minutes).

It starts where the paper's base model starts: its arithmetic, learnt from text problems, is sound, but its vision is
weak, and it answers a third to a half of the problems of both tasks correctly. Three steps, all of them supervised:

1. a byte-level BPE tokenizer of Qwen's kind, trained on the prompts;
2. a language model that solves the triangle in words ("Two angles of a triangle are 35 and 65 degrees. ..."), on every
   pair of angles but those of the validation and test splits;
3. images, until the accuracy of an average of the weights lies in the wanted band on the validation splits of both
   tasks. What is inside the band is shown less until it leaves the band. Nothing here looks at the test problems.

That model answers every question in tags. With --disobedient it is taught further, by the third step alone: a base for
the experiments of `python -m mr1fast.reproduce`, which does not always follow that instruction. Of what it is shown,
three of four answers to one wording of a question are in tags, and one of four to the other.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm
from transformers import GenerationConfig, Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mr1fast.data.example import Example
from mr1fast.data.scenes import BACKGROUNDS, SIZE
from mr1fast.data.tasks import TASKS
from mr1fast.errors import UserError
from mr1fast.evaluation.evaluate import evaluate
from mr1fast.model.load import EMBEDDED, load_model, load_processor
from mr1fast.model.policy import Policy
from mr1fast.model.processor import Qwen2VLTextImageProcessor
from mr1fast.options.program import Parser, at_least, exit_code
from mr1fast.options.prompt import PROMPT_SUFFIX
from mr1fast.reproduction.encoded import Encoded, EncodedOnce, Recent
from mr1fast.reproduction.lessons import (
    DISOBEDIENT,
    OBEDIENT,
    TEXT_PROBLEM,
    Curriculum,
    Lessons,
    Split,
    held_out_examples,
    image_examples,
    text_lessons,
)
from mr1fast.training.checkpoint import save_model
from mr1fast.training.run_folder import new_folder

PATCH = 7  # pixels; four patches make a token: 16 tokens for an image of 56 x 56
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
PADS = ("<|image_pad|>", "<|video_pad|>")
# Not special: decoding with skip_special_tokens=True must keep the tags, or the format reward would miss them.
WHOLE = ("<think>", "</think>", "<answer>", "</answer>", " " + PROMPT_SUFFIX)


def make_tokenizer() -> Qwen2Tokenizer:
    """Qwen's byte-level BPE with the merges of our own prompts; any text can be encoded."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    trained.decoder = decoders.ByteLevel()
    corpus = [*(task.questions[0] for task in TASKS.values()), TEXT_PROBLEM.format("", "")]
    corpus += ["user", "assistant", "system", " items"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        corpus * 10, trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],  # type: ignore[misc]
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        padding_side="left",
        model_max_length=1024,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL, *PADS]})
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in WHOLE])
    return tokenizer


def make_processor() -> Qwen2VLTextImageProcessor:
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        size={"shortest_edge": SIZE * SIZE, "longest_edge": SIZE * SIZE},
        # An empty scene is near zero, an item is near one: with CLIP's figures a tiny tower never starts to learn.
        image_mean=[sum(channel) / len(channel) / 255 for channel in zip(*BACKGROUNDS)],
        image_std=[0.3, 0.3, 0.3],
    )
    return Qwen2VLTextImageProcessor(image_processor, make_tokenizer(), chat_template=CHAT_TEMPLATE)


def make_model(tokenizer: Qwen2Tokenizer) -> Qwen2VLForConditionalGeneration:
    def token(text: str) -> int:
        return tokenizer.get_vocab()[text]

    # The usual 0.02 is far below 1 / sqrt(width) at this width: the image would never reach the answer.
    spread = 0.08
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "initializer_range": spread,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
            "bos_token_id": None,
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 2,
            "embed_dim": 64,
            "num_heads": 4,
            "hidden_size": 128,
            "patch_size": PATCH,
            "initializer_range": spread,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=token("<|im_end|>"), pad_token_id=token("<|endoftext|>"), do_sample=False
    )
    return model


# ---- training -------------------------------------------------------------------------------------------------------


def learn_text(model: Qwen2VLForConditionalGeneration, lessons: Lessons, steps: int = 600) -> None:
    """Teach the third angle from words until there are no mistakes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05, betas=(0.9, 0.98))
    warm_up, decay = (lambda step: (step + 1) / 50), (lambda step: (steps - step) / (steps / 2))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, warm_up(step), decay(step)))
    progress = tqdm(range(steps), desc="text")
    for _ in progress:
        loss = lessons.loss(model, torch.randint(0, len(lessons), (96,)))
        descend(model, optimizer, loss)
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.4f}")


def learn_images(
    model: Qwen2VLForConditionalGeneration,
    processor: Qwen2VLTextImageProcessor,
    text: Lessons,
    curriculum: Curriculum,
    rng: random.Random,
) -> tuple[Qwen2VLForConditionalGeneration, dict[str, dict[str, float]]]:
    """Teach the tasks until the averaged weights are in all bands. Returns that average."""
    lessons = {
        split: Lessons(processor, *image_examples(split, range(-count, 0), curriculum.tagged, rng))
        for split, count in curriculum.images.items()
    }
    watched = {split: held_out_examples(split, curriculum) for split in lessons}
    known: Encoded = Recent()
    # Without the average, greedy accuracy jumps between checkpoints.
    average: Any = AveragedModel(model, avg_fn=lambda old, new, _: old.lerp(new, curriculum.new_weight))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20))
    counts = dict(curriculum.batch)
    for step in tqdm(range(1000), desc="images"):
        loss = text.loss(model, torch.randint(0, len(text), (16,))) * 16
        for split, count in counts.items():
            if count:
                loss = loss + lessons[split].loss(model, torch.randint(0, len(lessons[split]), (count,))) * count
        descend(model, optimizer, loss / 80)
        schedule.step()
        average.update_parameters(model)
        if (step + 1) % curriculum.steps_between == 0:
            figures = watch(EncodedOnce(average.module, processor, known), watched)
            right = {split: figures[split]["greedy_accuracy"] for split in figures}
            form = {split: figures[split]["format_accuracy"] for split in figures}
            shown = (f"{'/'.join(split)} {right[split]:.0%} right, {form[split]:.0%} in tags" for split in right)
            tqdm.write(f"step {step + 1}: {'; '.join(shown)}")
            bands = curriculum.bands
            inside = all(bands[split][0] <= right[split] <= bands[split][1] for split in right)
            if inside and min(form.values()) > curriculum.form:
                return average.module, {"/".join(split): one for split, one in figures.items()}
            counts = {split: curriculum.shown(split, right[split]) for split in right}
    raise SystemExit("at no step was the accuracy of all tasks inside its band; try another --seed")


def watch(policy: Policy, watched: Mapping[Split, list[Example]]) -> dict[Split, dict[str, float]]:
    """The figures of greedy answers to what is held out."""
    return {
        split: evaluate(policy, examples, max_completion_length=20, sampled=0).figures()
        for split, examples in watched.items()
    }


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def run(arguments: Sequence[str] | None) -> None:
    """Raises UserError."""
    parser = Parser(
        prog="python -m mr1fast.make_embedded", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=EMBEDDED,
        metavar="DIR",
        help=f"new or empty folder for the model [default: {EMBEDDED}]",
    )
    parser.add_argument(
        "--seed", type=at_least(0), default=0, metavar="N", help="seed of the weights and of training [default: 0]"
    )
    parser.add_argument(
        "--disobedient",
        nargs="?",
        const=EMBEDDED,
        type=Path,
        metavar="DIR",
        help="teach the model in DIR, or else the package's, to answer in tags only part of the time; needs --output",
    )
    options = parser.parse(arguments)
    folder, start = options.output.resolve(), options.disobedient
    if start is not None and folder == EMBEDDED.resolve():
        raise UserError("--disobedient needs --output: the model that the package brings answers in tags")
    if folder != EMBEDDED.resolve():  # the package's own model is replaced
        new_folder(str(folder), default=folder)
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)  # a model of this size is slower on more threads

    rng = random.Random(options.seed)
    base, processor, reached = _obedient(rng) if start is None else _disobedient(start, rng)
    save_model(Policy(base, processor), folder)
    print(f"validation: {json.dumps(reached)}\nsaved to {folder}")


Made = tuple[Qwen2VLForConditionalGeneration, Qwen2VLTextImageProcessor, dict[str, dict[str, float]]]


def _obedient(rng: random.Random) -> Made:
    """From nothing."""
    processor = make_processor()
    model = make_model(processor.tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary of {len(processor.tokenizer)}")
    text = text_lessons(processor, OBEDIENT, rng)
    learn_text(model, text)
    base, reached = learn_images(model, processor, text, OBEDIENT, rng)
    return base, processor, reached


def _disobedient(start: Path, rng: random.Random) -> Made:
    """From the obedient model in this folder."""
    processor, model = load_processor(start), load_model(start)
    base, reached = learn_images(model, processor, text_lessons(processor, DISOBEDIENT, rng), DISOBEDIENT, rng)
    return base, processor, reached


def main(arguments: Sequence[str] | None = None) -> int:
    return exit_code(run, arguments)


if __name__ == "__main__":
    sys.exit(main())
