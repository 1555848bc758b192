"""A trained run -> one file for prediction, without the optimiser and whatever else training needs."""

from pathlib import Path

from kg_detectron.inference.model_file import load_model, save_model

# The weights of a run of `tools/train_net.py`, the better ones first.
WEIGHTS = ("model_best.pth", "model_final.pth")


def export_run(run: str | Path, output: str | Path, *, half: bool = False) -> Path:
    """Write the model of a run for prediction: weights, description of the network, and normalisation.

    Args:
        run: folder of a run; its ``model_best.pth`` is taken, or else its ``model_final.pth``. Or a checkpoint file.
        output: the file, replaced where it exists; see `save_model`. Its folder is made where absent.
        half: write the weights in 16 bits.
    Returns:
        The checkpoint that was taken.
    Raises:
        FileNotFoundError: no such run, or none of these files in it.
        ValueError: a checkpoint that does not describe a keypoint-graph network, `output` of another ending than
            ``.safetensors``, ``.pt`` and ``.pth``, or a weight that 16 bits cannot hold.
    """
    run, output = Path(run), Path(output)
    if output.suffix not in (".safetensors", ".pt", ".pth"):
        raise ValueError(f"output: expected a name that ends in .safetensors, .pt or .pth, got {output}")
    candidates = [run] if run.is_file() else [run / name for name in WEIGHTS]
    checkpoint = next((path for path in candidates if path.is_file()), None)
    if checkpoint is None:
        raise FileNotFoundError(f"{run}: there is neither {' nor '.join(WEIGHTS)} in it")
    model = load_model(checkpoint)
    output.parent.mkdir(parents=True, exist_ok=True)
    save_model(model, output, half=half)
    return checkpoint
