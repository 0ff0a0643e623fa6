"""Recipes, each a runnable file: `python -m models.NAME --help`."""
