"""A page to look at: predictions of one or several models on one dataset, image by image."""
