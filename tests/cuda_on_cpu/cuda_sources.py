"""Compile the CUDA sources of the operators as C++, to be run and watched on the CPU.

The sources are translated as text, as little as possible: a launch ``kernel<<<...>>>(...)`` becomes a call of the
machine, ``extern __shared__`` memory a pointer, and an operator is registered in a namespace of its own, on CPU
tensors. All go into one translation unit, so that PyTorch's headers are read once; ``#line`` keeps files and lines.
"""

import hashlib
import re
import subprocess
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "kg_detectron" / "layers" / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))

FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-omit-frame-pointer"]
# "races" gets GCC's instrumentation, whose functions are those of machine.cpp; "bounds" is AddressSanitizer's own.
INSTRUMENTATION = {
    "races": ["-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"],
    "bounds": ["-fsanitize=address"],
}


@dataclass(frozen=True)
class FaultyCopy:
    """A copy of a source with a planted fault, as an operator of its own: ``name`` of the source, ``fault``."""

    name: str
    fault: str
    changes: tuple[tuple[str, str], ...]  # pieces of the text, each there once, and what replaces them

    @property
    def operator(self) -> str:
        return f"{self.name}_{self.fault}"


def translate(text: str, name: str, operator: str) -> str:
    """A CUDA source as C++; its anonymous namespace gets the name of the operator."""
    text = re.sub(r'#include "(\.\./)?(\w+\.h)"', lambda found: _included(*found.groups()), translate_launches(text))
    dynamic = r"\1* \2 = static_cast<\1*>(::cuda_on_cpu::dynamic_shared());"
    text = re.sub(r"extern __shared__ (\w+) (\w+)\[\];", dynamic, text)
    text = text.replace("namespace {\n", f"namespace {operator}_cu {{\n", 1)
    text = text.replace("TORCH_LIBRARY_IMPL(kg_detectron, CUDA, m)", "TORCH_LIBRARY_FRAGMENT(kg_cuda_on_cpu, m)")
    return re.sub(rf'm\.impl\("{name}(\w*)", &kg::(\w+)\)', rf'm.def("{operator}\1", &kg::{operator}_cu::\2)', text)


def changed(text: str, copy: FaultyCopy) -> str:
    """The text with the fault."""
    for piece, replacement in copy.changes:
        if text.count(piece) != 1:
            raise ValueError(f"{copy.name}: expected once, found {text.count(piece)} times: {piece}")
        text = text.replace(piece, replacement)
    return text


def translate_launches(text: str) -> str:
    """Every ``kernel<<<blocks, threads, shared, stream>>>(arguments)`` as a call of `cuda_on_cpu::launch`."""
    while (begin := text.find("<<<")) >= 0:
        kernel = re.search(r"[\w:]+(<[^<>;(){}]*>)?$", text[:begin])
        end = text.index(">>>(", begin)
        configuration, first = text[begin + 3 : end], end + 4
        depth, last = 1, first
        while depth:
            depth += {"(": 1, ")": -1}.get(text[last], 0)
            last += 1
        call = (
            f'::cuda_on_cpu::launch("{kernel.group()}", {configuration}, '
            f"[](auto... arguments) {{ {kernel.group()}(arguments...); }}, {text[first : last - 1]})"
        )
        text = text[: kernel.start()] + call + text[last:]
    return text


def build(kind: str, copies: Sequence[FaultyCopy] = (), folder: Path = ROOT / "build" / "cuda_on_cpu") -> Path:
    """Compile the library, or take it from an earlier call with the same sources.

    Args:
        kind: a key of `INSTRUMENTATION`.
        copies: faulty ones, beside the true sources.
        folder: for all files.

    Returns:
        The library. Its operators are those of ``torch.ops.kg_cuda_on_cpu``.
    """
    parts = []
    for source in SOURCES:
        text = source.read_text(encoding="utf-8")
        parts += [f'#line 1 "{source}"', translate(text, source.stem, source.stem)]
        for copy in copies:
            if copy.name == source.stem:
                parts += [f'#line 1 "{source}"', translate(changed(text, copy), source.stem, copy.operator)]
    unit = "\n".join(parts)

    headers = sorted([*CSRC.rglob("*.h"), *HERE.rglob("*.h"), HERE / "machine.cpp", Path(__file__)])
    state = [unit, kind, torch.__version__, *(header.read_text(encoding="utf-8") for header in headers)]
    key = hashlib.sha256("\0".join(state).encode()).hexdigest()[:16]
    library = folder / f"{kind}-{key}.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    kernels, machine = library.with_suffix(".cpp"), HERE / "machine.cpp"
    kernels.write_text(unit, encoding="utf-8")
    include = [f"-I{HERE / 'include'}", *(f"-isystem{path}" for path in cpp_extension.include_paths())]
    include.append(f"-isystem{sysconfig.get_paths()['include']}")
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    # The race instrumentation is for the kernels alone, and libtsan stays out of the library.
    bounds = INSTRUMENTATION["bounds"] if kind == "bounds" else []
    objects = [str(library.with_suffix(suffix)) for suffix in (".machine.o", ".kernels.o")]
    linked = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10", "-ldl"]
    unfinished = library.with_suffix(".part")
    for command in (
        ["g++", *FLAGS, abi, *bounds, "-c", str(machine), "-o", objects[0]],
        ["g++", *FLAGS, abi, *INSTRUMENTATION[kind], *include, "-c", str(kernels), "-o", objects[1]],
        ["g++", "-shared", *bounds, *objects, *linked, "-o", str(unfinished)],
    ):
        subprocess.run(command, check=True)
    return unfinished.rename(library)


def _included(parent: str | None, name: str) -> str:
    return f'#include "{(CSRC if parent else CSRC / "cuda") / name}"'
