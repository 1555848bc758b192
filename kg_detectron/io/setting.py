"""Settings that Python and the command line share: errors with the names of either, and rules for their values."""

import re
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
    return "--" + {"ious": "iou"}.get(name, name).replace("_", "-")


def check_score(name: str, score: float | None) -> None:
    """Refuse a score that is none. None is a setting that was not given.

    Args:
        name: of the setting.

    Raises:
        SettingError: not a number of 0..1.
    """
    if score is not None and not 0 <= score <= 1:
        raise SettingError(name, f"expected a number of 0..1, got {score}")


def checked_channels(channels: str | Sequence[int | str]) -> tuple[int | str, ...]:
    """A choice of channels as numbers and names; a text is split at its commas.

    Raises:
        SettingError: there are neither one nor three, a number is below 1, or a name is empty.
    """
    parts = channels.split(",") if isinstance(channels, str) else list(channels)
    chosen: list[int | str] = []
    for part in parts:
        text = str(part).strip()
        chosen.append(int(text) if re.fullmatch(r"-?[0-9]+", text) else text)
    if len(chosen) not in (1, 3) or any(part == "" or (isinstance(part, int) and part < 1) for part in chosen):
        given = " ".join(str(part) or "''" for part in chosen) or "none"
        raise SettingError("channels", f"expected one or three, as names or numbers from 1, got {given}")
    return tuple(chosen)
