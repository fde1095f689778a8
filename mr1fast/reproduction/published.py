"""The paper's own numbers (OThink-MR1, arXiv 2503.16081v2), to stand beside ours."""

from __future__ import annotations

# Table 1, accuracy in per cent: size of Qwen2-VL -> arm -> task. Our arms that the paper does not have are not in it.
TABLE1: dict[str, dict[str, dict[str, float]]] = {
    "2b": {
        "base": {"vc": 42.50, "gr": 15.52},
        "grpo-mean": {"vc": 64.50, "gr": 30.24},
        "sft": {"vc": 68.50, "gr": 32.49},
        "grpo-d": {"vc": 76.50, "gr": 34.35},
    },
    "7b": {
        "base": {"vc": 76.00, "gr": 33.16},
        "grpo-mean": {"vc": 76.50, "gr": 42.04},
        "sft": {"vc": 74.50, "gr": 43.50},
        "grpo-d": {"vc": 78.00, "gr": 45.49},
    },
}
# Fig. 7, 2B: trained on the key's task and tested on the other, the change against the base in per cent of the base.
# That of SFT after GR follows from GRPO-D's +63.53 against the base and +61.63 against SFT.
FIG7: dict[str, dict[str, float]] = {
    "gr": {"grpo-d": 63.53, "sft": 100 * (1.6353 / 1.6163 - 1)},
    "vc": {"grpo-d": 4.25, "sft": -77.77},
}
