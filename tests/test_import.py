"""What the import of the loss functions costs."""

import subprocess
import sys


def test_import_leaves_the_compilers_alone():
    """torch's compiler takes two seconds to import, Triton a quarter of one, transformers several."""
    heavy = ("torch._dynamo", "torch._inductor", "triton", "transformers")
    code = "import sys; from mr1fast import grpo_loss, linear_grpo_loss\n"
    code += f"print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
