"""What pyproject.toml cannot say: the optional C++ extension (`mr1fast._C`), and packages that stand elsewhere.

Install torch first, then `pip install --no-build-isolation -e .`: the extension is built against that torch.
Without torch or a compiler at build time the install still succeeds, in pure Python, with a warning.
"""

import os
import platform
import sys
import warnings
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

NOT_BUILT = "mr1fast is installed without its C++ extension, and backend='cpp' will not be available"


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
    flags = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden"]
    # at::parallel_for is a header, and serial without OpenMP. Apple's compiler has none.
    openmp = [] if platform.system() == "Darwin" else ["-fopenmp"]
    # Such as address,undefined: see `make sanitize`.
    sanitizers = os.environ.get("MR1FAST_SANITIZE")
    sanitize = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g"]
    sanitize = sanitize if sanitizers else []
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


setup(
    packages=[*find_packages(include=["mr1fast", "mr1fast.*"]), "mr1fast.kernels", "mr1fast.csrc"],
    # mr1fast/kernels is a symlink to kernels/, so that the sources stand at the top level of the repository
    # while `import kernels` still finds Hugging Face's package of that name. csrc/ is for nvcc, at first use.
    package_dir={"mr1fast": "mr1fast", "mr1fast.kernels": "kernels", "mr1fast.csrc": "csrc"},
    package_data={
        "": ["*.jinja"],
        "mr1fast": ["embedded/*", "options/presets/*.yaml", "options/presets/*/*", "py.typed"],
        "mr1fast.csrc": ["*"],
    },
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildOrWarn},
)
