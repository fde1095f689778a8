"""`python -m benchmarks.steps_2b`: three GRPO-D steps of Qwen2-VL-2B's real shape with random weights, in bfloat16.

Images of the paper's size (401,408 pixels, 512 tokens), groups of 8. Prints and, with --csv, writes seconds, tokens and
peak memory of each step, and how a step's time divides into sampling and all else. Random weights hardly ever end a
completion, so that each is as long as --length allows. Nor do they earn a reward, and rows without an advantage are
left out of backward: the advantages are drawn at random instead, so that every row takes part. Both make it an upper
bound of a real step. `--tiny` takes the embedded model's shape instead and runs anywhere, to see that it works.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from benchmarks import report
from benchmarks.models import PIXELS, TEXT, VISION
from mr1fast.data.example import Example
from mr1fast.model.load import EMBEDDED, load_processor
from mr1fast.model.policy import Policy
from mr1fast.options.config import TrainConfig
from mr1fast.training.trainer import Trainer


class Photographs:
    """Noise of the paper's image size; every problem the same."""

    name = "noise"

    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> Example:
        noise = torch.randint(256, (616, 644, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        return Example(Image.fromarray(noise.numpy()), "How many different items are there in the image?", "3", f"{i}")


def build(tiny: bool, device: torch.device, dtype: torch.dtype) -> tuple[Policy, Policy]:
    """(policy, reference)."""
    processor = load_processor(EMBEDDED)
    own = Qwen2VLConfig.from_pretrained(EMBEDDED)
    config = own
    if not tiny:
        special = {
            name: value for name, value in own.to_dict().items() if name.endswith("_token_id") and value is not None
        }
        ends = {
            name: getattr(own.get_text_config(), name, None)
            for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        }
        vision = VISION | {"hidden_size": TEXT["hidden_size"]}
        config = Qwen2VLConfig(text_config=TEXT | ends, vision_config=vision, tie_word_embeddings=True, **special)
        images = processor.image_processor
        images.patch_size, images.merge_size, images.temporal_patch_size = 14, 2, 2
        images.size = {"shortest_edge": 3136, "longest_edge": PIXELS}

    def model() -> Qwen2VLForConditionalGeneration:
        with torch.device(device):
            built = Qwen2VLForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
        return nn.Module.to(built, device)

    policy, reference = Policy(model(), processor), Policy(model(), processor).freeze()
    reference.model.load_state_dict(policy.model.state_dict())
    return policy, reference


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--csv", metavar="FILE", help="write the rows there, each as soon as it is measured")
    parser.add_argument("--length", type=int, default=256, metavar="N", help="tokens of a completion (%(default)s)")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="(%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="the embedded model's shape, on any device")
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    if not (gpu or options.tiny):
        print("not measured: there is no CUDA device (--tiny runs anywhere)", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    device, dtype = (torch.device("cuda"), torch.bfloat16) if gpu else (torch.device("cpu"), torch.float32)
    policy, reference = build(options.tiny, device, dtype)
    config = dataclasses.replace(
        TrainConfig(task="vc").for_task("vc"),
        num_generations=8,
        prompts_per_step=2,
        gradient_accumulation_steps=2,
        max_completion_length=options.length,
        max_steps=options.steps,
    )
    trainer = Trainer(config, policy, reference, Photographs())
    parameters = sum(p.numel() for p in policy.model.parameters())
    about = report.environment()
    print(f"{about['device']}, {parameters / 1e6:.0f} M parameters, {dtype}", flush=True)
    rows: list[report.Row] = []
    for _ in range(options.steps):
        rows.append(measured_step(trainer, gpu))
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
        if options.csv:
            report.write_csv(Path(options.csv), rows, about)
    return 0


def measured_step(trainer: Trainer, gpu: bool) -> report.Row:
    """A step with advantages drawn at random; its time, tokens and peak memory."""
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    before = trainer.num_tokens
    started = time.perf_counter()
    data = trainer.collect()
    sampling = time.perf_counter() - started
    assert data.batch.advantages is not None
    advantages = torch.randn_like(data.batch.advantages)
    data = dataclasses.replace(data, batch=dataclasses.replace(data.batch, advantages=advantages))
    metrics = trainer.update(data)
    if gpu:
        torch.cuda.synchronize()
    if not metrics["grad_norm"] > 0:
        raise SystemExit(f"not a step: the norm of its gradient is {metrics['grad_norm']}")
    trainer.finished_steps += 1
    return {
        "step": trainer.finished_steps,
        "seconds": round(time.perf_counter() - started, 3),
        "seconds_sampling_and_reference": round(sampling, 3),
        "tokens": trainer.num_tokens - before,
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if gpu else "",
        "loss": metrics["loss"],
        "grad_norm": metrics["grad_norm"],
    }


if __name__ == "__main__":
    sys.exit(main())
