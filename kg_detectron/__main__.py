"""``python -m kg_detectron`` is ``kg-detectron``, where that is not on the path."""

from kg_detectron.cli import program

if __name__ == "__main__":
    program()
