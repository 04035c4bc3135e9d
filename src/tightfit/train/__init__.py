"""What `tightfit train` does."""
