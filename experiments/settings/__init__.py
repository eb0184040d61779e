"""Settings of an experiment: from a TOML file to cells, checked before torch is imported."""
