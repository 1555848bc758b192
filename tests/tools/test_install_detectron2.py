"""Where Detectron2 is looked for, in which order, and what is said: with a pretended pip and git."""

import install_detectron2 as installer
import pytest


class Machine:
    """Answers the commands of the installer as a machine of a certain kind would, and writes them down."""

    def __init__(self, *, wheel: bool, network: bool, builds: bool = True, imports: tuple[str, ...] = ()) -> None:
        self.wheel, self.network, self.builds = wheel, network, builds
        self.imports = imports  # the origins whose Detectron2 imports on this machine
        self.installed: str | None = None
        self.commands: list[str] = []

    def run(self, command: list[str], *, seconds: float, quiet: bool = False) -> bool:
        line = " ".join(command[1:])
        self.commands.append(line)
        if line.startswith("-c import detectron2"):
            return self.installed in self.imports
        if line.startswith("-m pip show"):
            return self.installed is not None
        if line.startswith("-m pip uninstall"):
            self.installed = None
            return True
        if "--no-index" in line:
            self.installed = "wheel" if self.wheel else None
            return self.wheel
        if line.startswith("ls-remote"):
            return self.network
        assert "git+https" in line, line
        self.installed = "git" if self.builds else None
        return self.builds


def installs(machine: Machine) -> list[str]:
    return [command for command in machine.commands if command.startswith("-m pip install")]


@pytest.mark.parametrize(
    ("machine", "already", "ends_with", "says"),
    [
        (Machine(wheel=True, network=True, imports=("own",)), "own", "own", "installed already"),
        (Machine(wheel=True, network=True, imports=("wheel",)), None, "wheel", "installed from a local wheel"),
        (Machine(wheel=True, network=True, imports=("wheel",)), "own", "wheel", "the one installed does not import"),
        (Machine(wheel=True, network=True, imports=("git",)), None, "git", "a local wheel does not import"),
        (Machine(wheel=False, network=True, imports=("git",)), None, "git", "installed from its repository"),
        (
            Machine(wheel=False, network=False),
            None,
            None,
            "NOT INSTALLED (no local wheel fits, and its repository cannot",
        ),
        (
            Machine(wheel=False, network=True, builds=False),
            None,
            None,
            "NOT INSTALLED (no local wheel fits, and the build",
        ),
        (Machine(wheel=True, network=True), None, None, "its repository does not import"),
    ],
    ids=[
        "already",
        "wheel",
        "already broken",
        "wheel of another PyTorch",
        "repository",
        "offline",
        "no compiler",
        "none imports",
    ],
)
def test_sources_in_order(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    machine: Machine,
    already: str | None,
    ends_with: str | None,
    says: str,
) -> None:
    machine.installed = already
    monkeypatch.setattr(installer, "run", machine.run)
    assert installer.install() == (ends_with is not None)
    assert machine.installed == ends_with
    assert says in capsys.readouterr().out
    for command in installs(machine):
        # Never the index's package of that name, never another PyTorch.
        assert "--no-deps" in command
        assert "--no-index" in command or command.endswith(f"git+{installer.REPOSITORY}@{installer.COMMIT}")


def test_without_uninstalls(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    machine = Machine(wheel=True, network=True, imports=("own",))
    machine.installed = "own"
    monkeypatch.setattr(installer, "run", machine.run)
    installer.remove()
    assert machine.installed is None and not installs(machine)
    assert "uninstalled, as asked" in capsys.readouterr().out


def test_unreachable_network_does_not_hang() -> None:
    assert not installer.run(["sleep", "30"], seconds=0.2)


def test_missing_program_is_a_failure_not_a_crash() -> None:
    assert not installer.run(["no-such-program-of-kg-detectron"], seconds=5)
