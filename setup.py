"""The package kg_detectron, its command and its dependencies."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

REQUIRES = [
    "fvcore",
    "imageio",
    "iopath",
    "numpy",
    "opencv-python-headless",
    "pycocotools",
    "scipy",
    "tifffile",
    "torch>=2.4",
    "torchvision",
    "tqdm",
]

EXTRAS = {
    "dev": [
        "hypothesis",
        "packaging",
        "pillow",
        "pytest>=8",
        "pytest-timeout",
        "pyyaml",
        "ruff",
    ],
    # What Detectron2 itself needs at commit 02b5c4e2. It is on no package index, and is installed with --no-deps
    # so that it cannot replace the pinned packages (tools/install_detectron2.py).
    "detectron2": [
        "Pillow>=7.1",
        "black",
        "cloudpickle",
        "fvcore>=0.1.5,<0.1.6",
        "hydra-core>=1.1",
        "iopath>=0.1.7,<0.1.10",
        "matplotlib",
        "omegaconf>=2.1,<2.4",
        "packaging",
        "pycocotools>=2.0.2",
        "setuptools<82",  # its model zoo imports pkg_resources, which setuptools 82 no longer has
        "tabulate",
        "tensorboard",
        "termcolor>=1.1",
        "tqdm>4.29.0",
        "yacs>=0.1.8",
    ],
}


def version() -> str:
    """Version from kg_detectron/__init__.py, read as text: importing the package needs its dependencies."""
    text = (ROOT / "kg_detectron" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE).group(1)


setup(
    name="kg_detectron",
    version=version(),
    description="Keypoint-graph cell instance segmentation as an extension of Detectron2",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["kg_detectron", "kg_detectron.*"]),
    python_requires=">=3.10,<3.13",
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["kg-detectron = kg_detectron.cli:main"]},
)
