"""GRPO-D in plain PyTorch: a small causal LM, random at first, learns to count upwards ("7" -> "890123").

The reward is verifiable, the loop is PyTorch and transformers, the loss is mr1fast's. Less than a minute on a CPU.
"""

import copy
from itertools import pairwise

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from mr1fast import GRPOLoss, KLSchedule

PROMPTS, GENERATIONS, LENGTH = 8, 8, 6


def reward(text: str) -> float:
    """Share of digits that are one more than the digit before, 0 following 9."""
    return sum((int(a) + 1) % 10 == int(b) for a, b in pairwise(text)) / (len(text) - 1)


def main(steps: int = 80, seed: int = 0) -> list[float]:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=10, num_key_value_heads=1, bos_token_id=None, eos_token_id=None, **sizes)
    model = Qwen2ForCausalLM(config)  # one token per digit
    reference = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    criterion = GRPOLoss(kl_schedule=KLSchedule(steps, beta_min=0.0, beta_max=0.01))
    mean_rewards = []
    for step in range(steps):
        prompts = torch.randint(10, (PROMPTS, 1)).repeat_interleave(GENERATIONS, dim=0)
        mask = torch.ones_like(prompts)
        tokens = model.generate(prompts, attention_mask=mask, do_sample=True, max_new_tokens=LENGTH)
        rewards = torch.tensor([reward("".join(map(str, row))) for row in tokens.tolist()])

        ids = tokens[:, 1:]
        with torch.no_grad():
            ref = reference(tokens).logits[:, :-1].log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        logits = model(tokens).logits[:, :-1]
        out = criterion(logits, ids, rewards=rewards, num_generations=GENERATIONS, ref_per_token_logps=ref)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        mean_rewards.append(rewards.mean().item())
        if step % 10 == 0 or step == steps - 1:
            beta, kl = criterion.kl_schedule.value, out.metrics()["kl"]
            print(f"step {step:3d}  reward {mean_rewards[-1]:.3f}  kl {kl:.3f}  beta {beta:.4f}")
        criterion.kl_schedule.step()
    return mean_rewards


if __name__ == "__main__":
    main()
