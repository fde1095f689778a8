"""Is a completion well formed?"""

from __future__ import annotations

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def format_reward(completion: str) -> float:
    """1.0 for `<think>...</think><answer>...</answer>` and nothing else around it, each tag exactly once; else 0.0."""
    text = completion.strip()
    if not all(text.count(tag) == 1 for tag in _TAGS):
        return 0.0
    between = text[text.index("</think>") + len("</think>") :].partition("<answer>")
    well_formed = text.startswith("<think>") and text.endswith("</answer>") and between[1] and not between[0].strip()
    return 1.0 if well_formed else 0.0
