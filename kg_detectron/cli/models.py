"""``kg-detectron models``: the models that come with the package."""

import argparse

from kg_detectron.inference.model_names import DEFAULT_MODEL, KEPT_MODELS, kept_models


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "models",
        help="list the models that come with the package",
        description="List the models that -m takes by name.",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print a line for every model."""
    models = kept_models()
    if not models:
        raise FileNotFoundError(f"there is no model in {KEPT_MODELS}")
    width = max(map(len, models))
    for name, path in models.items():
        default = ", the default" if name == DEFAULT_MODEL else ""
        print(f"{name:{width}}  {path} ({path.stat().st_size / 1e6:.1f} MB{default})")
    return 0
