"""The napari plugin: a widget that segments cells and adapts the model, and a reader of our results.

Only this package imports napari, and nothing in the core imports this package.
"""
