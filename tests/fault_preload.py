"""What the processes of tests/fault_runs.py have imported before they begin."""

import math_verify  # noqa: F401
import torch.utils.tensorboard  # noqa: F401

import mr1fast.evaluation.curves
import mr1fast.evaluation.samples
import mr1fast.training.loop  # noqa: F401
