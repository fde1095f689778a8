"""Run by `make wheel-check` in an environment with the wheel and what pip installed for it: is the loss all there?

Nothing but torch and Triton came along; importing the loss imports nothing else; it computes and differentiates, in
torch and in C++; the CUDA sources are there; and the command `mr1fast` says what it misses.
"""

import importlib.metadata
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

BEFORE = set(sys.modules)
import mr1fast  # noqa: E402
from mr1fast import GRPOLoss, KLSchedule, grpo_loss, linear_grpo_loss  # noqa: E402

IMPORTED = {name.partition(".")[0] for name in set(sys.modules) - BEFORE}


def requirements(*names: str) -> set[str]:
    """These distributions and what they need, extras aside."""
    found, waiting = set(), [name.lower().replace("_", "-") for name in names]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # for another platform
            continue
        needed = [re.match(r"[\w.-]+", line).group() for line in lines if "extra ==" not in line]
        waiting += [other.lower().replace("_", "-") for other in needed]
    return found


def check_what_came_along() -> None:
    installed = {d.metadata["Name"].lower().replace("_", "-") for d in importlib.metadata.distributions()}
    strangers = installed - requirements("torch", "triton") - {"mr1fast", "pip", "setuptools"}
    assert not strangers, f"installing the loss also installed {strangers}"
    assert not IMPORTED - {"mr1fast"} - set(sys.stdlib_module_names), f"importing the loss imported {IMPORTED}"
    assert "site-packages" in mr1fast.__file__, mr1fast.__file__


def check_the_loss() -> None:
    g = torch.Generator().manual_seed(0)
    ids, advantages = torch.randint(50, (4, 6), generator=g), torch.randn(4, generator=g)
    hidden, weight = torch.randn(4, 6, 8, generator=g), torch.randn(50, 8, generator=g)
    reference = torch.randn(4, 6, generator=g) - 4
    results = []
    for backend in ("torch", "cpp"):
        leaf = (hidden @ weight.T).requires_grad_()
        loss = grpo_loss(leaf, ids, advantages, ref_per_token_logps=reference, beta=0.1, backend=backend).loss
        loss.backward()
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        options = {"ref_per_token_logps": reference, "beta": 0.1, "backend": backend}
        linear = linear_grpo_loss(*leaves, ids, advantages, **options).loss
        linear.backward()
        results.append([loss, leaf.grad, linear, *(leaf.grad for leaf in leaves)])
        schedule = KLSchedule(10, beta_min=0.0, beta_max=0.2)  # 0.1 at step 0
        module = GRPOLoss(kl_schedule=schedule, backend=backend)
        assert module(leaf, ids, advantages, ref_per_token_logps=reference).loss == loss
    for theirs, ours in zip(*results):
        torch.testing.assert_close(ours, theirs)


def check_the_files() -> None:
    from mr1fast.kernels import cuda_build

    cuda_build.library_path("90a", "13.0")  # reads every one of the CUDA sources
    assert Path(mr1fast.__file__).with_name("py.typed").exists()


def check_the_command(folder: str) -> None:
    """`mr1fast`, started in an empty folder."""

    def says(*arguments: str, code: int) -> str:
        command = [Path(sys.executable).with_name("mr1fast"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout + done.stderr

    assert "usage: mr1fast" in says("--help", code=0)
    assert "cpp           runs" in says("env", code=0)
    for arguments in (["--help"], ["--output-dir", "run"]):
        assert '-m pip install "mr1fast[train]"' in says("train", *arguments, code=2)
    assert '-m pip install "mr1fast[integrations]"' in says("check", "--trl", code=2)
    assert not list(Path(folder).iterdir())


if __name__ == "__main__":
    check_what_came_along()
    check_the_loss()
    check_the_files()
    with tempfile.TemporaryDirectory() as folder:
        check_the_command(folder)
    print("the wheel works beside torch alone")
