#!/usr/bin/env python
"""What kg_detectron costs here: `ops`, `model`, `images`, `large`, `slide` and `tasks`; see the folder benchmark."""

from benchmark.command import main

if __name__ == "__main__":
    main()
