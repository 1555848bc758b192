"""The help text of ``--layout``, which two commands have."""

LAYOUT_HELP = (
    "labels: one label image an image, NAME.tif or NAME_labels.tif; cells: one file a cell, NAME/*.png, or where "
    "IMAGES and MASKS are one folder, NAME/images/*.png and NAME/masks/*.png; default: what is there"
)
