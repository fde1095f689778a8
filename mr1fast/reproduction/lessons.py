"""What a base is shown: problems of the tasks with their completions, in tags or not, and how many of them.

`mr1fast.make_embedded` teaches it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration

from mr1fast.data.example import Example
from mr1fast.data.tasks import LABELLED, TASKS, angle_pairs, wording
from mr1fast.model.processor import Qwen2VLTextImageProcessor
from mr1fast.model.prompts import encode_prompts

TEXT_PROBLEM = "Two angles of a triangle are {} and {} degrees. What is the third angle?"
PLAIN = "{}, so {}"  # an answer without tags

Split = tuple[str, str]  # of a task: its name and that of the split


@dataclass(frozen=True)
class Curriculum:
    """What a base is shown, and when it is done.

    images: the number of drawings; so many that no picture is remembered: a base that knows its pictures by heart is
    too sure of itself to explore. batch: how many of them a step shows, and `kept` is what is left of that for a split
    inside its band; beyond it, none. tagged: the share of the completions that are in tags, for each wording of a
    question; with one share, only the first wording is asked. text_tagged: the share in the text problems. bands:
    lowest and highest greedy accuracy on what is held out, asked in the first wording. form: what share of its answers
    must be in tags. new_weight: of each step in the average of the weights.
    """

    images: Mapping[Split, int]
    batch: Mapping[Split, int]
    kept: float
    tagged: tuple[float, ...]
    text_tagged: float
    bands: Mapping[Split, tuple[float, float]]
    form: float
    held_out: int
    new_weight: float
    steps_between: int  # evaluations

    def shown(self, split: Split, right: float) -> int:
        """How many drawings of a split a step shows while so many of its problems are right."""
        low, high = self.bands[split]
        return self.batch[split] if right < low else int(self.batch[split] * self.kept) if right <= high else 0


VC, FAR, GR = ("vc", "train"), ("vc", "far"), ("gr", "train")
# What is promised of it is an accuracy of 0.30 to 0.60 on the test splits.
OBEDIENT = Curriculum(
    images={VC: 3000, GR: 6000},
    batch={VC: 32, GR: 32},
    kept=0,
    tagged=(1.0,),
    text_tagged=1.0,
    bands={VC: (0.34, 0.44), GR: (0.34, 0.44)},
    form=0.95,
    held_out=300,
    new_weight=0.1,
    steps_between=5,
)
# It has seen vehicles, on dark grounds alone: a model that is trained on shapes could know them, as Qwen2-VL does.
DISOBEDIENT = Curriculum(
    images={VC: 3000, FAR: 3000, GR: 6000},
    batch={VC: 16, FAR: 16, GR: 32},
    kept=0.25,
    tagged=(0.75, 0.25),
    text_tagged=0.5,
    bands={VC: (0.44, 0.68), FAR: (0.44, 0.68), GR: (0.43, 0.65)},
    form=0.9,
    held_out=150,
    new_weight=0.05,
    steps_between=10,
)


# ---- lessons ---------------------------------------------------------------------------------------------------------


def completion(reasoning: str, answer: str, *, tagged: bool) -> str:
    return f"<think>{reasoning}</think><answer>{answer}</answer>" if tagged else PLAIN.format(reasoning, answer)


def text_pairs() -> list[tuple[int, int]]:
    """Ordered pairs of whole degrees, odd ones too, but none of the validation and test splits."""
    held_out = {*angle_pairs("validation"), *angle_pairs("test")}
    angles = range(LABELLED[0], LABELLED[-1] + 1)
    pairs = [(a, b) for a in angles for b in angles if a + b < 180]
    return [(a, b) for a, b in pairs if (min(a, b), max(a, b)) not in held_out]


def image_examples(
    split: Split, indices: range, tagged: Sequence[float], rng: random.Random
) -> tuple[list[Example], list[str]]:
    """Drawings that neither the trainer nor a test will draw (negative indices), and their completions."""
    task, examples, completions = TASKS[split[0]], [], []
    for index in indices:
        example = task.example(split[1], index, reworded=len(tagged) > 1)
        share = tagged[wording(task, split[1], index) if len(tagged) > 1 else 0]
        examples.append(example)
        completions.append(completion(example.columns["reasoning"], example.solution, tagged=rng.random() < share))
    return examples, completions


def held_out_examples(split: Split, curriculum: Curriculum) -> list[Example]:
    """Problems to watch, in the first wording: of the validation split, or for a split to test on, more of its kind."""
    task, count = TASKS[split[0]], curriculum.held_out
    if split[1] == "train":
        return [task.example("validation", index) for index in range(count)]
    return [task.example(split[1], index - curriculum.images[split]) for index in range(-count, 0)]


class Lessons:
    """Problems of one kind with their completions, from which batches are drawn.

    Questions are encoded at once, each wording once; an image when it is drawn, as most never are. Every problem has an
    image of the same size, or none has one.
    """

    def __init__(self, processor: Qwen2VLTextImageProcessor, examples: Sequence[Example], completions: Sequence[str]):
        self.images, self.images_of = processor.image_processor, [example.images for example in examples]
        first = {example.problem: example for example in reversed(examples)}
        places = {problem: place for place, problem in enumerate(first)}
        place = torch.tensor([places[example.problem] for example in examples])
        questions = encode_prompts(processor, [*first.values()])
        self.prompts = {name: rows[place] for name, rows in questions.items() if name != "pixel_values"}
        tokenizer = processor.tokenizer
        text = [completion + tokenizer.eos_token for completion in completions]
        encoded = tokenizer(text, padding=True, padding_side="right", return_tensors="pt")
        self.completion_ids, self.completion_mask = encoded["input_ids"], encoded["attention_mask"]

    def __len__(self) -> int:
        return len(self.completion_ids)

    def loss(self, model: Qwen2VLForConditionalGeneration, rows: Tensor) -> Tensor:
        """Mean negative log-likelihood of the completions' tokens."""
        batch = {name: tensor[rows] for name, tensor in self.prompts.items()}
        if drawn := [image for row in rows.tolist() for image in self.images_of[row]]:
            batch["pixel_values"] = self.images(images=drawn, return_tensors="pt")["pixel_values"]
        ids, mask = self.completion_ids[rows], self.completion_mask[rows]
        labels = torch.cat([torch.full_like(batch["input_ids"], -100), ids.masked_fill(mask == 0, -100)], 1)
        batch["input_ids"] = torch.cat([batch["input_ids"], ids], 1)
        batch["attention_mask"] = torch.cat([batch["attention_mask"], mask], 1)
        batch["mm_token_type_ids"] = torch.cat([batch["mm_token_type_ids"], torch.zeros_like(ids)], 1)
        return model(**batch, labels=labels).loss


def text_lessons(processor: Qwen2VLTextImageProcessor, curriculum: Curriculum, rng: random.Random) -> Lessons:
    pairs = text_pairs()
    examples = [Example(None, TEXT_PROBLEM.format(a, b), str(180 - a - b), f"text/{a}/{b}") for a, b in pairs]
    share = curriculum.text_tagged
    answers = [(f"{a}+{b}={a + b}", str(180 - a - b)) for a, b in pairs]
    return Lessons(processor, examples, [completion(*one, tagged=rng.random() < share) for one in answers])
