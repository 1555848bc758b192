"""Writers of results: one file a kind, one table of them."""
