"""One file per framework, which each imports when it is imported itself. Nothing below `integrations` needs them."""
