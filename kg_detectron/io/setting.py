"""Settings that Python and the command line share: errors with the names of either, and rules for their values."""

from collections.abc import Sequence


class SettingError(ValueError):
    """A setting has a wrong value, or does not go with another one.

    Args:
        settings: the names; the command line calls them ``--min-score`` where Python calls them ``min_score``.
        text: what was expected and what came.
    """

    def __init__(self, settings: str | Sequence[str], text: str) -> None:
        self.settings = (settings,) if isinstance(settings, str) else tuple(settings)
        self.text = text
        super().__init__(f"{', '.join(self.settings)}: {text}")

    def as_options(self) -> str:
        """The message with the names of options."""
        return f"{', '.join(option(name) for name in self.settings)}: {self.text}"


def option(name: str) -> str:
    """What the command line calls a setting."""
    return "--" + name.replace("_", "-")


def check_score(name: str, score: float | None) -> None:
    """Refuse a score that is none. None is a setting that was not given.

    Args:
        name: of the setting.

    Raises:
        SettingError: not a number of 0..1.
    """
    if score is not None and not 0 <= score <= 1:
        raise SettingError(name, f"expected a number of 0..1, got {score}")
