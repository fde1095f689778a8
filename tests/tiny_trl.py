"""A tiny text model and task for TRL's trainer: random weights, a tokenizer of 20 characters, a reward on digits."""

import warnings

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen2Config, Qwen2ForCausalLM
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
