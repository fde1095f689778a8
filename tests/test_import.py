"""What importing mr1fast costs and needs: torch and Triton for the loss, what pyproject.toml declares for the rest."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OF_THE_INTEGRATIONS = ("mr1fast/integrations/", "mr1fast/model/liger.py")  # Liger's layers only where it is installed
OF_THE_LOSS = ("kernels", "mr1fast/losses", "mr1fast/__init__.py", "mr1fast/checks.py", "mr1fast/errors.py")
# Imported only where the user has it; the loss of that trainer does without.
UNDECLARED = {"verl", "hydra", "tensordict"}  # the others come with verl


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*extras):
    """The distributions that the package requires, and these extras of it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + [line for extra in extras for line in project["optional-dependencies"][extra]]
    return {canonical(re.match(r"[\w.-]+", line).group()) for line in lines}


@pytest.mark.slow
def test_import_leaves_the_compilers_alone():
    """torch's compiler takes two seconds to import, Triton a quarter of one, transformers several."""
    heavy = ("torch._dynamo", "torch._inductor", "triton", "transformers")
    code = "import sys; from mr1fast import grpo_loss, linear_grpo_loss\n"
    code += f"print([name for name in {heavy} if name in sys.modules])"
    assert run(code) == "[]"


def test_the_loss_needs_no_package_of_an_extra():
    """Imported and computed where numpy, transformers and all the others cannot be imported."""
    extras = declared("train", "integrations") - declared() - {"mr1fast", "jinja2"}  # jinja2 comes with torch, too
    owners = metadata.packages_distributions().items()
    blocked = {module for module, names in owners if {canonical(name) for name in names} & extras}
    assert {"numpy", "PIL", "yaml", "transformers", "datasets", "matplotlib"} <= blocked
    code = f"""
import sys, torch
sys.modules.update(dict.fromkeys({blocked}))  # "import numpy" raises, although torch has imported it
from mr1fast import GRPOLoss, KLSchedule, grpo_loss, linear_grpo_loss
logits, ref = torch.randn(2, 3, 7, requires_grad=True), torch.zeros(2, 3)
ids, advantages = torch.zeros(2, 3, dtype=torch.long), torch.ones(2)
grpo_loss(logits, ids, advantages).loss.backward()
linear_grpo_loss(torch.randn(2, 3, 4), torch.randn(7, 4), ids, advantages)
GRPOLoss(kl_schedule=KLSchedule(9, beta_min=0.0, beta_max=0.1))(logits, ids, advantages, ref_per_token_logps=ref)
print(logits.grad.abs().sum() > 0, sys.modules["numpy"])
"""
    assert run(code) == "tensor(True) None"


# ---- what is imported is declared ----------------------------------------------------------------------------------


def imported(file):
    """The top-level names of the absolute imports in a file, wherever in it they stand."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]


def extras_of(file):
    """What an installation has when it imports that file of the package."""
    if file.startswith(OF_THE_LOSS):
        return ()
    return ("train", "integrations") if file.startswith(OF_THE_INTEGRATIONS) else ("train",)


def test_what_is_imported_is_declared():
    distributions = metadata.packages_distributions()
    own = {"mr1fast", *sys.stdlib_module_names, *UNDECLARED}
    undeclared = set()
    for path in [*ROOT.glob("kernels/*.py"), *ROOT.glob("mr1fast/**/*.py")]:
        file = path.relative_to(ROOT).as_posix()
        for module in set(imported(path)) - own:
            names = {canonical(distribution) for distribution in distributions.get(module, [module])}
            if not names & declared(*extras_of(file)):
                undeclared.add(f"{file}: {module}")
    assert not undeclared, "declare it in pyproject.toml, or do not import it there"
