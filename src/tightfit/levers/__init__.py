"""One module or package for each lever."""
