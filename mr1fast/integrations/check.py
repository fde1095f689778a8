"""Compare the numbers that TRL, Liger or verl computes with those that mr1fast computes in their place.

    python -m mr1fast.integrations.check --trl --liger --verl

`--trl` trains the embedded Qwen2-VL for a few steps with TRL's GRPOTrainer and with GRPODTrainer from the same seed, on
drawings and a reward that varies; `--liger` compares one random batch per loss type, `--verl` one per objective. For
your own model, data and settings, call `compare_trl(trainer)`. The exit code is 1 if anything differs by more than
rounding.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mr1fast.integrations import SHARED_LOSS_TYPES
from mr1fast.options.program import at_least, missing_package, prog

# Relative difference allowed: float32 rounding, accumulated over the layers and over a few optimizer steps.
TOLERANCE = 1e-3
COMPARED = ("loss", "grad_norm", "kl", "entropy", "clip_ratio/region_mean")


@dataclass(frozen=True)
class Row:
    """One number, computed twice."""

    name: str
    theirs: float
    ours: float

    @property
    def difference(self) -> float:
        """Relative to the larger of the two, absolute below 0.01; NaN on both sides is no difference."""
        if self.theirs != self.theirs and self.ours != self.ours:
            return 0.0
        return abs(self.ours - self.theirs) / max(abs(self.ours), abs(self.theirs), 0.01)


def table(rows: Sequence[Row], theirs: str) -> str:
    width = max(len(row.name) for row in rows)
    lines = [f"{'':{width}} {theirs:>14} {'mr1fast':>14} {'difference':>11}"]
    for row in rows:
        mark = "" if row.difference <= TOLERANCE else "  <--"
        lines.append(f"{row.name:{width}} {row.theirs:14.7g} {row.ours:14.7g} {row.difference:11.1e}{mark}")
    return "\n".join(lines)


def compare_trl(trainer: Any) -> list[Row]:
    """One batch of a GRPOTrainer, by TRL's loss and by ours: the loss, every metric, and the gradient.

    Call it before training: it draws a batch (which is dropped) and leaves weights and gradients as they were. Raises
    ValueError for what `patch_trl` does not take.
    """
    from mr1fast.integrations.trl import patch_trl, unpatch

    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer._buffered_inputs = None

    def measure() -> tuple[dict[str, float], torch.Tensor]:
        trainer.model.zero_grad()
        trainer._metrics["train"].clear()
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        gradients = [p.grad.flatten().double() for p in trainer.model.parameters() if p.grad is not None]
        values = {"loss": loss.item(), **{name: v[-1] for name, v in trainer._metrics["train"].items()}}
        trainer.model.zero_grad()
        trainer._metrics["train"].clear()
        return values, torch.cat(gradients)

    theirs, their_gradient = measure()
    patch_trl(trainer)
    try:
        ours, our_gradient = measure()
    finally:
        unpatch(trainer)
    rows = [Row(name, value, ours[name]) for name, value in theirs.items()]
    norm = their_gradient.norm().item()
    error = (our_gradient - their_gradient).norm().item() / max(norm, 1e-30)
    return [*rows, Row("gradient norm", norm, our_gradient.norm().item()), Row("|g - g'| / |g|", 0.0, error)]


def train(
    trainer_class: Any, config_class: Any, folder: str, *, before: Callable[[Any], Any] | None = None, **settings: Any
) -> list[dict[str, float]]:
    """Train the embedded Qwen2-VL with TRL for a few steps, on drawings to count; returns the metrics of each step.

    before: is called with the trainer before it trains. settings: of the config, over the defaults here.
    """
    from datasets import Dataset
    from transformers import PrinterCallback

    from mr1fast.data.tasks import TASKS
    from mr1fast.model.load import EMBEDDED, load_processor
    from mr1fast.options.prompt import PROMPT_SUFFIX

    examples = [TASKS["vc"].example("train", i) for i in range(8)]
    data = {
        "prompt": [[{"role": "user", "content": f"{example.problem} {PROMPT_SUFFIX}"}] for example in examples],
        "image": [example.image for example in examples],
    }
    defaults = {
        "output_dir": folder,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "num_iterations": 2,
        "max_completion_length": 8,
        "temperature": 2.0,  # the embedded model is often sure, and a group of equals teaches nothing
        "beta": 0.04,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    trainer = trainer_class(
        model=str(EMBEDDED),
        reward_funcs=_varied,
        args=config_class(**{**defaults, **settings}),
        train_dataset=Dataset.from_dict(data),
        processing_class=load_processor(),
    )
    trainer.remove_callback(PrinterCallback)
    if before is not None:
        before(trainer)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def _varied(completions: Any, **_: Any) -> list[float]:
    """A reward that differs within any group, so that there is something to learn: the mean letter."""
    texts = [str(completion[0]["content"]) for completion in completions]
    return [sum(map(ord, text)) / max(len(text), 1) % 7 for text in texts]


def check_trl(steps: int, loss_types: Sequence[str]) -> list[Row]:
    from trl import GRPOConfig, GRPOTrainer

    from mr1fast.integrations.trl import GRPODConfig, GRPODTrainer

    rows = []
    for loss_type in loss_types:
        settings: dict[str, Any] = {"max_steps": steps, "loss_type": loss_type}
        if loss_type == "cispo":
            settings["epsilon_high"] = 1.5
        with tempfile.TemporaryDirectory() as folder:
            theirs = train(GRPOTrainer, GRPOConfig, folder, **settings)
            ours = train(GRPODTrainer, GRPODConfig, folder, **settings)
        for step, (his, mine) in enumerate(zip(theirs, ours), start=1):
            names = [name for name in COMPARED if name in his]
            rows += [Row(f"{loss_type}, step {step}: {name}", his[name], mine[name]) for name in names]
    return rows


def check_liger(loss_types: Sequence[str]) -> list[Row]:
    """One random batch per loss type through Liger's fused linear loss and ours: loss, KL, clip ratio, gradients."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss as Theirs

    from mr1fast.integrations.liger import LigerFusedLinearGRPOLoss as Ours

    device = "cuda" if torch.cuda.is_available() else "cpu"
    B, L, V, H = 4, 16, 500, 32
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(B, L, H, generator=g), 0.3 * torch.randn(V, H, generator=g)
    ids = torch.randint(V, (B, L), generator=g)
    mask = (torch.arange(L) < torch.tensor([[16], [9], [1], [12]])).long()
    logps = (hidden @ weight.T).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    old, ref = (logps + 0.3 * torch.randn(B, L, generator=g) for _ in range(2))
    batch = [t.to(device) for t in (ids, mask, torch.tensor([1.0, -0.7, 0.3, -1.2]))]
    scored = {"ref_per_token_logps": ref.to(device), "old_per_token_logps": old.to(device)}

    def measure(module: Any, **settings: Any) -> dict[str, float]:
        leaves = [t.to(device).detach().requires_grad_() for t in (hidden, weight)]
        loss, (kl, clip_ratio) = module(**settings)(*leaves, *batch, **scored)
        gradients = torch.autograd.grad(loss, leaves)
        norms = {f"gradient norm of {n}": g.norm().item() for n, g in zip(("hidden", "lm_head"), gradients)}
        return {"loss": loss.item(), "kl": kl.item(), "clip_ratio": clip_ratio.item(), **norms}

    rows = []
    for loss_type in loss_types:
        if loss_type == "luspo":  # the docstring of mr1fast.integrations.liger says why they differ
            continue
        settings = {"loss_type": loss_type, "max_completion_length": L}
        theirs, ours = measure(Theirs, compiled=False, **settings), measure(Ours, **settings)
        rows += [Row(f"{loss_type}: {name}", value, ours[name]) for name, value in theirs.items()]
    return rows


def check_verl() -> list[Row]:
    """One random batch per objective (and per aggregation) through verl's policy losses and `grpo_d`: loss, metrics,
    gradient.
    """
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import ActorConfig

    from mr1fast.integrations.verl import AGGREGATIONS, OBJECTIVES, PolicyLossConfig, grpo_d

    B, L = 4, 16
    g = torch.Generator().manual_seed(0)
    old = -3 * torch.rand(B, L, generator=g)
    batch = {
        "old_log_prob": old,
        "advantages": torch.randn(B, L, generator=g),
        "response_mask": torch.arange(L) < torch.tensor([[16], [9], [1], [12]]),
        "rollout_is_weights": 0.5 + torch.rand(B, L, generator=g),
    }
    log_prob = old + torch.randn(B, L, generator=g)
    log_prob[0, :2] = old[0, :2] + torch.tensor([25.0, -25.0])  # beyond verl's clamp

    def measure(loss_function: Any, objective: str, mode: str) -> dict[str, float]:
        own = {"clip_cov_ratio": 0.1, "clip_cov_lb": 0.1, "kl_cov_ratio": 0.2}  # large enough for a small batch
        config = ActorConfig(
            strategy="fsdp",
            rollout_n=1,
            ppo_micro_batch_size_per_gpu=1,
            clip_ratio_high=0.28,
            policy_loss=PolicyLossConfig(loss_mode="grpo_d", objective=objective, **own),
        )
        torch.manual_seed(0)  # clip_cov draws
        leaf = log_prob if objective == "vanilla" else log_prob.clamp(-9, -0.01)  # where verl has no clamp
        leaf = leaf.detach().clone().requires_grad_()
        loss, metrics = loss_function(**batch, log_prob=leaf, loss_agg_mode=mode, config=config)
        (gradient,) = torch.autograd.grad(loss, leaf)
        return {"loss": loss.item(), **metrics, "gradient norm": gradient.norm().item()}

    rows = []
    for objective in OBJECTIVES:
        for mode in AGGREGATIONS if objective == "vanilla" else ["seq-mean-token-mean"]:
            theirs, ours = (measure(f, objective, mode) for f in (get_policy_loss_fn(objective), grpo_d))
            rows += [Row(f"{objective}, {mode}: {name}", value, ours[name]) for name, value in theirs.items()]
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=prog("integrations.check"), description=__doc__.split("\n")[0])
    parser.add_argument("--trl", action="store_true", help="train for a few steps with TRL's trainer and with ours")
    parser.add_argument("--liger", action="store_true", help="compute one batch per loss type with Liger and with us")
    parser.add_argument("--verl", action="store_true", help="compute one batch per objective with verl and with us")
    parser.add_argument(
        "--steps", type=at_least(1), default=4, metavar="N", help="optimizer steps for --trl [default: 4]"
    )
    parser.add_argument(
        "--loss-type",
        nargs="+",
        choices=SHARED_LOSS_TYPES,
        help="loss types to compare [default: grpo for --trl, all for --liger]",
    )
    options = parser.parse_args(argv)
    if options.liger and options.loss_type == ["luspo"]:
        parser.error(
            "--liger cannot compare luspo, in which Liger counts masked tokens: see mr1fast.integrations.liger"
        )
    checks: dict[str, Callable[[], list[Row]]] = {
        "TRL": lambda: check_trl(options.steps, options.loss_type or ["grpo"]),
        "Liger": lambda: check_liger(options.loss_type or SHARED_LOSS_TYPES),
        "verl": check_verl,
    }
    chosen = [library for library in checks if getattr(options, library.lower())]
    if not chosen:
        parser.error("choose --trl, --liger, --verl or several of them")
    different = 0
    for library in chosen:
        try:
            rows = checks[library]()
        except ModuleNotFoundError as error:
            why = missing_package(error, "integrations")
            if library == "verl":  # it is in no extra of ours: its requirements include an engine for a GPU
                package = str(error.name).partition(".")[0]
                why = f"the package {package!r} is not installed for {sys.executable}; see verl's documentation"
            print(f"error: --{library.lower()}: {why}", file=sys.stderr)
            return 2
        print(table(rows, library))
        different += sum(row.difference > TOLERANCE for row in rows)
    print(f"{different} numbers differ by more than {TOLERANCE}" if different else "no difference beyond rounding")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
