"""fmeta."""
