"""One file per framework. Each imports its framework when it is imported; `train`, `forecast`, `doctor` and `cli` use them."""
