"""An export of `verl_export`, read by verl's own classes on a CPU: what its trainer does before a GPU is needed.

    python -m mr1fast.integrations.verl check DIR

The options are composed by verl's configuration, a batch comes out of its dataset, its reward manager scores it, and
its ppo_loss is computed on the exported settings and compared with our `grpo_loss`.
"""

from __future__ import annotations

import asyncio
import re
import shlex
from pathlib import Path
from typing import Any

import torch

from mr1fast import grpo_loss
from mr1fast.errors import UserError
from mr1fast.losses.kl_weight import kl_weight
from mr1fast.model.load import load_processor

SHOWN = 8  # problems
TOLERANCE = 1e-5
COMPLETIONS = ("<think>so</think><answer>{}</answer>", "{}", "<answer>nothing</answer>")


def check(folder: Path) -> str:
    """Returns what was found to be right. Raises UserError for anything else, and where verl is not installed."""
    if not (folder / "run.sh").is_file():
        raise UserError(f"{folder} is not an export: there is no run.sh in it")
    try:
        import verl
    except ModuleNotFoundError as error:
        raise UserError(f"verl is not installed here ({error}); see verl's documentation") from error
    config = composed(folder)
    rows = check_dataset(config)
    check_rewards(config, rows)
    check_loss(config)
    return f"{folder}: verl {verl.__version__} reads {len(rows)} problems, their rewards and the loss as meant"


def overrides(script: str, folder: Path) -> list[str]:
    """The options of verl in run.sh."""
    lines = re.findall(r"^    (\S.*) \\$", script, re.MULTILINE)
    return [word for line in lines for word in shlex.split(line.replace("$here", str(folder.absolute())))]


def composed(folder: Path) -> Any:
    """verl's configuration with the exported options. Raises UserError for one that verl does not have."""
    import verl.trainer
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException

    where = Path(verl.trainer.__file__).parent / "config"
    script = (folder / "run.sh").read_text(encoding="utf-8")
    with initialize_config_dir(str(where), version_base=None):
        try:
            return compose("ppo_trainer", overrides(script, folder))
        except HydraException as error:
            raise UserError(f"verl does not take the options of run.sh: {' '.join(str(error).split())}") from error


def check_dataset(config: Any) -> list[dict[str, Any]]:
    """The first problems, as verl's dataset gives them; their prompts are those of our own loop."""
    from verl.utils.dataset.rl_dataset import RLHFDataset

    processor = load_processor(config.actor_rollout_ref.model.path)
    rows: list[dict[str, Any]] = []
    for files in (config.data.train_files, config.data.val_files):
        dataset = RLHFDataset(files, processor.tokenizer, config.data, processor)
        rows += [dataset[i] for i in range(min(SHOWN, len(dataset)))]
    for row in rows:
        images = [part["image"] for turn in row["raw_prompt"] for part in turn["content"] if "image" in part]
        text = processor.apply_chat_template(row["raw_prompt"], add_generation_prompt=True, tokenize=False)
        inputs = processor(text=[text], images=images or None, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        if length > config.data.max_prompt_length:
            raise UserError(f"a prompt of {row['extra_info']['name']} has {length} tokens, more than max_prompt_length")
    return rows


def check_rewards(config: Any, rows: list[dict[str, Any]]) -> None:
    """verl's reward manager gives a right answer more than a wrong one."""
    import numpy as np
    from verl import DataProto
    from verl.trainer.ppo.reward import load_reward_manager

    tokenizer = load_processor(config.actor_rollout_ref.model.path).tokenizer
    manager = load_reward_manager(config, tokenizer)
    for row in rows:
        scores = []
        for form in COMPLETIONS:
            text = form.format(row["reward_model"]["ground_truth"])
            ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
            kept = {name: np.array([row[name]], dtype=object) for name in ("data_source", "reward_model", "extra_info")}
            tensors = {"responses": ids, "attention_mask": torch.ones_like(ids)}
            data = DataProto.from_dict(tensors=tensors, non_tensors=kept)
            scores.append(asyncio.run(_scored(manager, data)))
        if not scores[0] >= max(scores[1:]):
            raise UserError(f"the rewards of {row['extra_info']['name']} are not as meant: {scores}")


async def _scored(manager: Any, data: Any) -> float:
    manager.loop = asyncio.get_running_loop()
    return (await manager.run_single(data))["reward_score"]


def check_loss(config: Any) -> None:
    """ppo_loss with the exported options is the paper's loss, at the KL weight of the schedule."""
    from tensordict import NonTensorData, TensorDict
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.utils.losses import ppo_loss

    import mr1fast.integrations.verl  # noqa: F401 (registers grpo_d)
    from mr1fast.integrations.verl import set_kl_loss_coef

    actor: Any = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    policy, steps = actor.policy_loss, config.trainer.total_training_steps
    beta = actor.kl_loss_coef if actor.use_kl_loss else 0.0
    if getattr(policy, "beta_max", None) is not None:
        names = {"kl_schedule": "schedule", "beta_min": "beta_min", "beta_max": "beta_max"}
        keywords = {ours: getattr(policy, theirs) for theirs, ours in names.items()}
        beta = kl_weight(steps // 2, steps, explore_fraction=policy.explore_fraction, **keywords)
        set_kl_loss_coef(actor, beta)
    g = torch.Generator().manual_seed(0)
    lengths = (6, 2, 4)
    logits = [torch.randn(n, 11, generator=g) for n in lengths]
    ids = [torch.randint(11, (n,), generator=g) for n in lengths]
    logps = [one.log_softmax(-1).gather(1, i[:, None])[:, 0] for one, i in zip(logits, ids)]
    old, ref = ([one + 0.3 * torch.randn(len(one), generator=g) for one in logps] for _ in range(2))
    advantages = torch.tensor([1.0, -0.7, 0.3])
    pad = torch.nn.utils.rnn.pad_sequence
    data, output = _packed(lengths, old, ref, advantages, logps)
    settings = {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None, "max_response_len": max(lengths)}
    data |= {name: NonTensorData(value) for name, value in settings.items()}
    theirs, _ = ppo_loss(actor, output, TensorDict(data, batch_size=[len(lengths)]))
    ours = grpo_loss(
        pad(logits, batch_first=True),
        pad(ids, batch_first=True),
        advantages,
        completion_mask=pad([torch.ones(n) for n in lengths], batch_first=True).bool(),
        old_per_token_logps=pad(old, batch_first=True),
        ref_per_token_logps=pad(ref, batch_first=True),
        beta=beta,
    ).loss
    if abs(theirs.item() - ours.item()) > TOLERANCE:
        raise UserError(f"verl's ppo_loss is {theirs.item()} on the exported settings, and ours {ours.item()}")


def _packed(lengths: Any, old: Any, ref: Any, advantages: Any, logps: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """verl's batch without padding: each prompt is one token."""

    def nested(rows: Any) -> torch.Tensor:
        return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)

    ones = [torch.ones(n) for n in lengths]
    data = {
        "prompts": nested([torch.zeros(1, dtype=torch.long) for _ in lengths]),
        "responses": nested([torch.zeros(n, dtype=torch.long) for n in lengths]),
        "response_mask": nested([one.long() for one in ones]),
        "old_log_probs": nested(old),
        "ref_log_prob": nested(ref),
        "advantages": nested([advantage * one for advantage, one in zip(advantages, ones)]),
    }
    # The log-probability of a token stands at the one before it; the last position has none.
    return data, {"log_probs": nested([torch.cat([one, torch.zeros(1)]) for one in logps])}
