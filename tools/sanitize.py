"""Run the tests of the C++ operators with AddressSanitizer and UndefinedBehaviorSanitizer (called by `make sanitize`).

The operators are compiled apart, into ``build/sanitize``, and loaded in place of those in use. Needs g++
and its sanitizers; where they are missing it says so and tests nothing.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "build" / "sanitize" / "_C.so"
FLAGS = ["-O1", "-g", "-fno-omit-frame-pointer", "-ffp-contract=off", "-fopenmp"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"]
TESTS = ["tests/layers"]
# A process of its own and compilation under the sanitizers test nothing of the operators.
LEFT_OUT = "not warning and not under_compile and not cuda and not reference"


def compile_library() -> None:
    """Compile the C++ operators with the sanitizers."""
    LIBRARY.parent.mkdir(parents=True, exist_ok=True)
    include = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    libraries = Path(torch.__file__).parent / "lib"
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    objects, running = [], []
    for source in sorted((ROOT / "kg_detectron" / "layers" / "csrc").rglob("*.cpp")):
        objects.append(str(LIBRARY.with_name(source.stem + ".o")))
        command = ["g++", "-std=c++17", "-fPIC", abi, *FLAGS, *SANITIZERS, *include, "-c", str(source)]
        running.append(subprocess.Popen([*command, "-o", objects[-1]]))
        if len(running) == (os.cpu_count() or 1):
            finish(running)
    finish(running)
    command = ["g++", "-shared", "-fopenmp", *SANITIZERS, *objects, f"-L{libraries}", "-ltorch_cpu", "-lc10"]
    subprocess.run([*command, "-o", str(LIBRARY)], check=True)


def finish(running: list[subprocess.Popen]) -> None:
    """Wait for compilers; stop where one failed."""
    failed = [process.wait() for process in running]
    running.clear()
    if any(failed):
        sys.exit("the operators do not compile with the sanitizers")


def find_runtime() -> list[str]:
    """The libraries that must be loaded first. Ends the program, as if all was well, where one is missing."""
    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    try:
        asked = [["g++", f"-print-file-name={name}"] for name in names]
        found = [subprocess.run(one, capture_output=True, text=True, check=True).stdout.strip() for one in asked]
        missing = [name for name, path in zip(names, found, strict=True) if not Path(path).is_absolute()]
    except (OSError, subprocess.CalledProcessError):
        missing = ["g++"]
    if missing:
        print(f"NOT TESTED WITH SANITIZERS: {', '.join(missing)} is not installed")
        sys.exit(0)
    return found


def main() -> None:
    """Entry point of the command line."""
    start = time.monotonic()
    # The interpreter is not compiled with the sanitizer: its runtime must come first, and leaks are the interpreter's.
    runtime = find_runtime()
    compile_library()
    compiled = time.monotonic()
    environment = os.environ | {
        "LD_PRELOAD": ":".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "KG_DETECTRON_LIBRARY": str(LIBRARY),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--capture=no", "-k", LEFT_OUT, *TESTS]
    status = subprocess.run(command, cwd=ROOT, env=environment).returncode
    print(f"sanitizers: {compiled - start:.0f} s to compile, {time.monotonic() - compiled:.0f} s to test")
    sys.exit(status)


if __name__ == "__main__":
    main()
