"""Evaluations, comparisons, curves, sweeps and trainings as tables on the terminal and as HTML pages with plots."""
