"""Install Detectron2 into the environment of this interpreter, from where it can be had (called by the Makefile).

Detectron2 is on no package index: what an index offers under its name is somebody else's. So this takes, in this order,
the one that is installed already; a wheel from the local folders that pip is told to look into (``PIP_FIND_LINKS``);
the public repository at a fixed commit, which compiles for some minutes. Where none can be had, it says so in one line
and succeeds: kg_detectron predicts without Detectron2; training through it and the Mask R-CNN baseline need it.

``--without`` removes an installed Detectron2 instead, to see the project as those see it who have none.
"""

import argparse
import os
import subprocess
import sys

REPOSITORY = "https://github.com/facebookresearch/detectron2.git"
COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"
# Everything of Detectron2 that kg_detectron.d2 stands on. Its compiled part may be missing; this imports without it.
IMPORT = "import detectron2.data, detectron2.engine, detectron2.evaluation, detectron2.model_zoo, detectron2.modeling"
REACH_SECONDS = 30
BUILD_SECONDS = 3600


def say(line: str) -> None:
    """Print one line about Detectron2 at once, in order with the output of pip."""
    print(f"Detectron2: {line}", flush=True)


def run(command: list[str], *, seconds: float, quiet: bool = False) -> bool:
    """Run ``command`` for at most ``seconds``; True if it succeeded. ``quiet`` drops its output."""
    # git must neither ask for a password nor wait on a connection slower than 1 kB/s for half a minute.
    environment = os.environ | {
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_HTTP_LOW_SPEED_LIMIT": "1000",
        "GIT_HTTP_LOW_SPEED_TIME": "30",
    }
    stream = subprocess.DEVNULL if quiet else None
    try:
        return subprocess.run(command, env=environment, stdout=stream, stderr=stream, timeout=seconds).returncode == 0
    except (subprocess.TimeoutExpired, FileNotFoundError):
        return False


def pip(*arguments: str, seconds: float = 600, quiet: bool = False) -> bool:
    """Run pip of this interpreter; True if it succeeded."""
    return run([sys.executable, "-m", "pip", *arguments], seconds=seconds, quiet=quiet)


def imports() -> bool:
    """Whether Detectron2 imports, in a fresh process: a binary built for another PyTorch may crash it."""
    return run([sys.executable, "-c", IMPORT], seconds=300, quiet=True)


def is_installed() -> bool:
    """Whether pip knows a Detectron2 here, importable or not."""
    return pip("show", "detectron2", quiet=True)


def uninstall() -> None:
    """Remove an installed Detectron2."""
    pip("uninstall", "--yes", "--quiet", "detectron2")


def keep_if_it_imports(origin: str) -> bool:
    """True if the Detectron2 just installed from ``origin`` imports; otherwise uninstall it again and say so."""
    if imports():
        say(f"installed from {origin}.")
        return True
    uninstall()
    say(f"the one from {origin} does not import with this Python and PyTorch, and was uninstalled again.")
    return False


def install() -> bool:
    """Install Detectron2 from the first source that gives one which imports; True if there is one in the end."""
    if imports():
        say("installed already.")
        return True
    if is_installed():
        uninstall()
        say("the one installed does not import with this Python and PyTorch, and was uninstalled.")

    # --no-index: never the package of that name on an index. --no-deps: never another PyTorch than the pinned one.
    if pip("install", "--no-index", "--no-deps", "detectron2", quiet=True) and keep_if_it_imports("a local wheel"):
        return True

    if run(["git", "ls-remote", REPOSITORY, "HEAD"], seconds=REACH_SECONDS, quiet=True):
        say(f"building commit {COMMIT[:8]} of {REPOSITORY}, which takes some minutes.")
        source = f"git+{REPOSITORY}@{COMMIT}"
        built = pip("install", "--no-deps", "--no-build-isolation", source, seconds=BUILD_SECONDS)
        if built and keep_if_it_imports("its repository"):
            return True
        reason = "no local wheel fits, and the build from its repository failed"
    else:
        reason = "no local wheel fits, and its repository cannot be reached"
    say(f"NOT INSTALLED ({reason}). Going on without it: prediction works, training through it does not.")
    return False


def remove() -> None:
    """Uninstall Detectron2 where it is installed, and say which of the two it was."""
    if is_installed():
        uninstall()
        say("uninstalled, as asked; the next set-up without DETECTRON2=no brings it back.")
    else:
        say("not installed, as asked.")


def main() -> None:
    """Entry point of the command line."""
    parser = argparse.ArgumentParser(description="Install Detectron2 from where it can be had, or go on without it.")
    parser.add_argument("--without", action="store_true", help="uninstall Detectron2 instead")
    if parser.parse_args().without:
        remove()
    else:
        install()


if __name__ == "__main__":
    main()
