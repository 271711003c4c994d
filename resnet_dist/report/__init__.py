"""Plots, tables and pages of a run or an evaluation."""
