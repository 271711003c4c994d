"""Evaluation: one record per image first, then every metric from the records."""
