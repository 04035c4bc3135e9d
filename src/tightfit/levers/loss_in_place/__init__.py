"""The loss in place."""
