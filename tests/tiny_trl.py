"""A tiny text model and task for TRL's trainer: random weights, a tokenizer of 20 characters, a reward on digits."""

import warnings

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen2Config, Qwen2ForCausalLM, TrainerCallback
from transformers.utils import logging

CHARACTERS = "0123456789+-= ."
warnings.filterwarnings("ignore", module="torch.utils.data")
logging.set_verbosity_error()


def build(folder, config_class=Qwen2Config, model_class=Qwen2ForCausalLM, **changes):
    """Save model and tokenizer to `folder`; returns its name."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(vocabulary),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
        "tie_word_embeddings": True,
    }
    model_class(config_class(**{**sizes, **changes})).save_pretrained(folder)
    return str(folder)


def prompts():
    return Dataset.from_dict({"prompt": [f"{a}+{b}=" for a in range(3) for b in range(10, 14)]})


def even_digits(completions, **_):
    """Share of even digits: it varies within a group, whatever the model says."""
    return [sum(c in "02468" for c in text) / max(len(text), 1) for text in completions]


def train(folder, trainer_class, config_class, output, *, before=None, resume=False, peft_config=None, **settings):
    """Train a few steps and return (log history without the summary, trainer)."""
    defaults = {
        "output_dir": str(output),
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 4,
        "num_iterations": 2,
        "learning_rate": 0.3,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_eval_batch_size": 4,
        "disable_tqdm": True,
        "seed": 7,
    }
    trainer = trainer_class(
        model=folder,
        reward_funcs=even_digits,
        args=config_class(**{**defaults, **settings}),
        train_dataset=prompts(),
        eval_dataset=prompts().select(range(2)),
        peft_config=peft_config,
    )
    trainer.remove_callback(PrinterCallback)
    if before is not None:
        before(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return [entry for entry in trainer.state.log_history if "train_runtime" not in entry], trainer


LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo")


def every_loss_type(trainer):
    """Let the trainer take two steps (on-policy, then off-policy) with each loss type in turn."""

    class Switch(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            trainer.loss_type = LOSS_TYPES[state.global_step // 2]
            trainer.epsilon_high = 1.5 if trainer.loss_type == "cispo" else 0.2

    trainer.add_callback(Switch())


def assert_every_loss_type_was_at_work(steps):
    """Parity is worth something only where clipping and the KL are at work."""
    assert len(steps) == 2 * len(LOSS_TYPES)
    for i, loss_type in enumerate(LOSS_TYPES):
        on_policy, off_policy = steps[2 * i : 2 * i + 2]
        assert off_policy["kl"] > 0.01
        if loss_type == "cispo":
            assert on_policy["cispo_clip_ratio"] == 0 < off_policy["cispo_clip_ratio"]
        elif loss_type == "sapo":
            assert "clip_ratio/region_mean" not in off_policy
        else:
            assert on_policy["clip_ratio/region_mean"] == 0 < off_policy["clip_ratio/region_mean"]


def assert_same_steps(ours, theirs, rtol=1e-4, atol=2e-5):
    """Every metric that TRL logs, at every step, within float32 rounding (which the steps accumulate)."""
    assert len(ours) == len(theirs)
    for mine, his in zip(ours, theirs):
        assert set(mine) == set(his) | {"beta"}
        for name in set(his) - {"step_time"}:
            assert mine[name] == pytest.approx(his[name], rel=rtol, abs=atol, nan_ok=True), (name, his["step"])
