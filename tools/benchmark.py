#!/usr/bin/env python
"""What kg_detectron costs here: `tools/benchmark.py ops`, `model` or `large`; see the folder benchmark."""

from benchmark.command import main

if __name__ == "__main__":
    main()
