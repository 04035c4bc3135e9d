"""One file per framework; each imports its framework when it is imported, and nothing else in tightfit imports them."""
