"""What a training run leaves behind, and what a picture of it may meet."""

import json

import numpy as np
from PIL import Image

# Nothing that one would want to draw: broken characters, control characters, half of a formula, no glyph in any font.
ODD = "\ud83d\0\x1b[31m $a_{$ $\\frac$ \u202e\u2028\x85\U000e0001\U0010ffff\ufeff 每个 مرحبا 🙂 \udcff" + "́" * 200


def row(step, task="vc", **changes):
    metrics = {
        "rewards/accuracy_reward/mean": 0.4 + step / 100,
        "rewards/format_reward/mean": 1.0,
        "reward": 0.9,
        "kl": 0.01 * step,
        "beta": 0.04,
        "entropy": 0.5,
        "completions/mean_length": 12.0,
        "loss": -0.1,
        "step_time": 0.3,
    }
    if step % 5 == 0:
        metrics |= {f"eval/{task}/greedy_accuracy": 0.5, f"eval/{task}/sampled_accuracy": 0.4}
    return {"task": task, "step": step, **metrics, **changes}


def untimed(metrics):
    """What does not depend on how busy the machine is."""
    return {name: value for name, value in metrics.items() if not name.startswith("step_time")}


def write_run(folder, rows, result=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def not_blank(file):
    return len(np.unique(np.asarray(Image.open(file).convert("L")))) > 10
