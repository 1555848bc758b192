"""Images and masks in and out, without model code."""
