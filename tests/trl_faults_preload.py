"""What the processes of tests/trl_faults.py have imported before they begin."""

import trl.trainer.grpo_trainer  # noqa: F401

import mr1fast.training.loop  # noqa: F401
