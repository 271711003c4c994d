"""Measure where the time of training goes, with the program's own loop and loaders."""
