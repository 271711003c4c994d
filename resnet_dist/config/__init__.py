"""Settings: the dataclasses, their layers (recipe, TOML file, command line) and the recipes. No torch here."""
