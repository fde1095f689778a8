"""Packaging. The package is pure Python plus one optional C++ extension (`mr1fast._C`).

Install torch first, then `pip install --no-build-isolation -e .`: the extension is built against that torch.
Without torch or a compiler at build time the install still succeeds, in pure Python, with a warning.
"""

import re
from pathlib import Path

from setuptools import setup

VERSION = re.search(r'__version__ = "(.+)"', Path("mr1fast/__init__.py").read_text(encoding="utf-8")).group(1)

# Versions are ranges here; only constraints.txt pins.
REQUIREMENTS = [
    "torch>=2.11",
    "triton>=3.6; platform_system == 'Linux'",
    "transformers>=5.17",
    "safetensors>=0.5",
    "accelerate>=1.10",
    "datasets>=4.0",
    "math-verify>=0.8",
    "matplotlib>=3.9",
    "numpy>=2.0",
    "pillow>=11",
    "pyyaml>=6",
    "tensorboard>=2.18",
    "tqdm>=4.66",
]
EXTRAS = {
    "flash": ["flash-attn>=2.7"],
    "integrations": ["trl>=1.16,<2", "liger-kernel>=0.8.5", "peft>=0.18"],
    "test": ["pytest>=8", "pytest-benchmark>=5", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "hypothesis>=6.100"],
    "lint": ["ruff>=0.14", "mypy>=1.18", "pre-commit>=4", "types-PyYAML"],
}
EXTRAS["dev"] = EXTRAS["integrations"] + EXTRAS["test"] + EXTRAS["lint"]

setup(
    name="mr1fast",
    version=VERSION,
    description="Fused GRPO-D loss kernels and a minimal trainer that teaches Qwen2-VL to reason",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=["mr1fast", "mr1fast.kernels"],
    # mr1fast/kernels is a symlink to kernels/, so that the sources stand at the top level of the repository
    # while `import kernels` still finds Hugging Face's package of that name.
    package_dir={"mr1fast": "mr1fast", "mr1fast.kernels": "kernels"},
    package_data={"mr1fast": ["embedded/*"]},
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
)
