"""Parts that several attacks are built from."""
