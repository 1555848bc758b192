"""Writers of results: one file a kind of result, and one table of them in `kg_detectron.export.kinds`."""
