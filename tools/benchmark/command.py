"""The command line of tools/benchmark.py."""

import argparse

import torch

from benchmark import images, large, models, operators, slide, tasks
from kg_detectron.layers import ops


def main() -> None:
    """Entry point of the command line."""
    parser = argparse.ArgumentParser(prog="benchmark.py", description="what kg_detectron costs on this machine")
    commands = parser.add_subparsers(dest="command", required=True)
    for module in (operators, models, images, large, slide, tasks):
        module.add_command(commands)
    arguments = parser.parse_args()
    for device in [arguments.device] if arguments.device else ["cpu", *["cuda"] * torch.cuda.is_available()]:
        name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
        kind = "compiled operators" if device in ops.COMPILED_FOR else "PyTorch reference"
        print(f"\n{device} ({name}), PyTorch {torch.__version__}, {kind}")
        arguments.benchmark(arguments, device)
