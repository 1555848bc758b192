"""The compiled operators of the package, and the configs in its wheels; all else about it stands in pyproject.toml.

The C++ operators are always built; the CUDA ones too where a CUDA toolkit is found (``CUDA_HOME``) or ``FORCE_CUDA=1``,
and not with ``FORCE_CUDA=0``. ``TORCH_CUDA_ARCH_LIST`` names the GPUs to build for. What cannot be built is reported,
the PyTorch reference stands in for it, and the installation goes on; only with ``FORCE_CUDA=1`` it fails.

pip builds in an environment of its own, with the newest PyTorch of the declared range; with ``--no-build-isolation``
the operators belong to the PyTorch that is installed.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = Path("kg_detectron", "layers", "csrc")  # relative to ROOT, as setuptools wants it


def sources(*suffixes: str) -> list[str]:
    """The files of the operators that end so, relative to ROOT."""
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / CSRC).rglob("*") if path.suffix in suffixes)


def say(line: str) -> None:
    """Print one line about the operators at once, in order with the compiler's output."""
    print(f"kg_detectron operators: {line}", flush=True)


def compile_operators(cuda: bool) -> Path:
    """Compile the shared library, load it once to see that it is whole, and return its path."""
    import torch
    from torch.utils import cpp_extension

    if cuda and not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.is_available():
        # No GPU to ask. This one is quick to build, and later GPUs translate its PTX when they first load it.
        os.environ["TORCH_CUDA_ARCH_LIST"] = "7.5+PTX"
    # Beside the interpreter of a virtual environment, which need not be on the PATH, lies ninja.
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    folder = ROOT / "build" / ("operators-cuda" if cuda else "operators-cpp")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "lock").unlink(missing_ok=True)  # of a build that was killed, for which this one would wait for ever
    threads = ["-fopenmp"] if sys.platform == "linux" else []  # what at::parallel_for is compiled to
    if sys.platform == "win32":  # MSVC, which contracts nothing unless told to
        flags = ["/O2"]
    else:  # GCC and Clang
        flags = [
            "-O3",
            "-ffp-contract=off",  # equal distances stay equal, as they are in the reference and on the GPU
            "-fno-trapping-math",  # floating-point traps and errno, which nothing here reads, prevent vectorised loops
            "-fno-math-errno",
            "-fno-tree-slp-vectorize",  # two votes written as one vector delay the next additions to them
        ]
    cpp_extension.load(
        "_C",
        [str(ROOT / path) for path in sources(".cpp", *([".cu"] if cuda else []))],
        extra_cflags=[*flags, *threads],
        extra_cuda_cflags=["-O3", "--fmad=false"],
        extra_ldflags=threads,
        build_directory=str(folder),
        with_cuda=cuda,
        is_python_module=False,
    )
    return next(path for path in folder.glob("_C.*") if path.suffix in (".so", ".pyd"))


class BuildOperators(build_ext):
    """``build_ext`` by PyTorch's own builder. What cannot be built is reported and left out, but for FORCE_CUDA=1."""

    def run(self) -> None:
        if self.inplace:  # no outdated library may stay behind where nothing new can be built
            for old in (ROOT / CSRC.parent).glob("_C.*"):
                old.unlink()
        super().run()

    def build_extension(self, extension: Extension) -> None:
        toolkit = Path("/usr/local/cuda")
        if not os.environ.get("CUDA_HOME") and (toolkit / "include" / "cuda_runtime.h").is_file():
            os.environ["CUDA_HOME"] = str(toolkit)  # PyTorch would ask for nvcc on the PATH, which may be a launcher
        force = os.environ.get("FORCE_CUDA", "")
        try:
            import torch
            from torch.utils.cpp_extension import CUDA_HOME
        except ImportError:
            say("NOT BUILT: PyTorch is not installed here. Install it, or leave out pip's --no-build-isolation.")
            if force == "1":
                sys.exit("kg_detectron operators: FORCE_CUDA=1, and PyTorch is not installed.")
            return
        has_cuda = CUDA_HOME is not None and torch.version.cuda is not None
        if force == "1" and not has_cuda:
            missing = "a PyTorch with CUDA" if torch.version.cuda is None else "a CUDA toolkit (CUDA_HOME)"
            sys.exit(f"kg_detectron operators: FORCE_CUDA=1, and {missing} was not found.")
        for cuda in (True, False) if has_cuda and force != "0" else (False,):
            parts = "C++ and CUDA" if cuda else "C++"
            say(f"building {parts}, which takes some minutes.")
            try:
                library = compile_operators(cuda)
            except Exception as error:  # a compiler, a linker or ninja that is missing or fails, in whatever way
                print(error, flush=True)
                say(f"building {parts} FAILED, see above.")
                if force == "1":
                    sys.exit("kg_detectron operators: FORCE_CUDA=1, and the CUDA part cannot be built.")
            else:
                target = Path(self.get_ext_fullpath(extension.name))
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(library, target)
                # For the check when it is loaded (kg_detectron/layers/ops.py).
                target.with_name("_C.torch").write_text(f"{torch.__version__}\n", encoding="utf-8")
                say(f"built {parts}.")
                return
        say("NOT BUILT: the PyTorch reference runs instead, which is much slower.")


class BuildWithConfigs(build_py):
    """``build_py`` that takes ``configs/`` along into the package, where `kg_detectron.d2.model_zoo` finds them."""

    def run(self) -> None:
        super().run()
        for source, target in self._configs():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *(str(target) for _, target in self._configs())]

    def _configs(self) -> list[tuple[Path, Path]]:
        """(source, target) of each; none in a checkout, which has them."""
        if getattr(self, "editable_mode", False):
            return []
        target = Path(self.build_lib, "kg_detectron")
        return [(path, target / path.relative_to(ROOT)) for path in sorted((ROOT / "configs").rglob("*.yaml"))]


setup(
    # Not a Python module but a plain library, hence one wheel for all versions of Python.
    ext_modules=[
        Extension(
            "kg_detectron.layers._C",
            sources=sources(".cpp", ".cu"),
            depends=sources(".h"),
            py_limited_api=True,
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildOperators, "build_py": BuildWithConfigs},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
