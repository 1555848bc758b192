"""The models that come with the package, by name; and whether a file can be a model at all. Without PyTorch."""

from pathlib import Path

# The models that come with the package.
KEPT_MODELS = Path(__file__).parents[1] / "models"
DEFAULT_MODEL = "nuclei"

SAFETENSORS = ".safetensors"
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"  # how files of torch.save begin, the new and the old ones


def kept_models() -> dict[str, Path]:
    """The files of the models that come with the package, by name."""
    return {path.stem: path for path in sorted(KEPT_MODELS.glob(f"*{SAFETENSORS}"))}


def model_path(model: str | Path) -> Path:
    """The file of a model that is given by its path, or by the name of a kept model.

    Raises:
        FileNotFoundError: neither; the message lists the kept models.
        ValueError: a file that is no model file by its first bytes, such as a picture.
    """
    path, kept = Path(model), kept_models()
    if path.is_dir():
        raise ValueError(f"{model} is a folder, expected a model file; kg-detectron export makes one of a training run")
    if path.is_file():
        _check_first_bytes(path)
        return path
    if str(model) in kept:
        return kept[str(model)]
    names = ", ".join(kept) or "none"
    raise FileNotFoundError(f"there is no model file {model}, and no kept model of that name (there are: {names})")


def _check_first_bytes(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(9)
    if path.suffix == SAFETENSORS:
        # The length of the header, 8 bytes, and the header, which is JSON.
        is_model = start[8:9] == b"{"
    else:
        is_model = start.startswith((_ZIP, _PICKLE))
    if not is_model:
        raise ValueError(
            f"{path} is no model file: expected a .safetensors file, or a checkpoint (.pth, .pt) of PyTorch"
        )
