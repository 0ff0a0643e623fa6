"""Recipes: one runnable file for each system. `python -m models.NAME --help`."""
