"""Packaging. The package is pure Python plus one optional C++ extension (`mr1fast._C`).

Install torch first, then `pip install --no-build-isolation -e .`: the extension is built against that torch.
Without torch or a compiler at build time the install still succeeds, in pure Python, with a warning.
"""

import os
import platform
import re
import sys
import warnings
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

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
    "pebble>=5.1",
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


def extensions() -> list[Extension]:
    """The CPU kernel, built against the torch that is installed; none, with a warning, where there is no torch.

    Windows has no build: the kernel uses GCC's and Clang's language extensions.
    """
    if sys.platform == "win32":
        return []
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError:
        warnings.warn(f"{NOT_BUILT}: torch is not importable at build time", stacklevel=2)
        return []
    flags = ["-std=c++20", "-O3", "-fvisibility=hidden"]
    # at::parallel_for is a header, and serial without OpenMP. Apple's compiler has none.
    openmp = [] if platform.system() == "Darwin" else ["-fopenmp"]
    sanitize = ["-fsanitize=address", "-fno-omit-frame-pointer", "-g"] if os.environ.get("MR1FAST_SANITIZE") else []
    return [
        Extension(
            "mr1fast._C",
            sources=[f"csrc/{name}.cpp" for name in ("bindings", "grpo_cpu", "head_gemms", "row_kernels")],
            depends=[str(header) for header in sorted(Path("csrc").glob("*.h"))],
            include_dirs=include_paths(),
            library_dirs=library_paths(),
            libraries=["c10", "torch_cpu", "torch"],
            extra_compile_args=[*flags, *openmp, *sanitize],
            extra_link_args=[*openmp, *sanitize],
        )
    ]


class BuildOrWarn(build_ext):
    """A failed build is a warning: everything but `backend="cpp"` works without it.

    Extension(optional=True) is not enough: without a compiler an editable install then fails on the missing file.
    """

    def run(self):
        try:
            super().run()
        except Exception as error:
            warnings.warn(f"{NOT_BUILT}: {error}", stacklevel=2)
            self.extensions = []


NOT_BUILT = "mr1fast is installed without its C++ extension, and backend='cpp' will not be available"

setup(
    name="mr1fast",
    version=VERSION,
    description="Fused GRPO-D loss kernels and a minimal trainer that teaches Qwen2-VL to reason",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["mr1fast", "mr1fast.*"]), "mr1fast.kernels"],
    # mr1fast/kernels is a symlink to kernels/, so that the sources stand at the top level of the repository
    # while `import kernels` still finds Hugging Face's package of that name.
    package_dir={"mr1fast": "mr1fast", "mr1fast.kernels": "kernels"},
    package_data={"mr1fast": ["embedded/*"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildOrWarn},
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
)
