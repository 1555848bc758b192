"""File names from JSON files and archives, which must stay in the folder they belong to."""

from pathlib import PurePosixPath, PureWindowsPath


def checked_relative_path(name: object) -> PurePosixPath:
    """Refuse a file name that could lead out of the folder it belongs to, on any operating system.

    Args:
        name: a file name from a JSON file or an archive, with slashes or, as Windows has them, backslashes.

    Returns:
        The same with slashes.

    Raises:
        ValueError: not a name, absolute, or with a part "..".
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"expected a file name, got {name!r}")
    windows = PureWindowsPath(name)  # splits at forward slashes too
    if windows.drive or windows.root or ".." in windows.parts:
        raise ValueError(f"refused the file name {name!r}: it must be relative, without '..'")
    return PurePosixPath(windows.as_posix())
