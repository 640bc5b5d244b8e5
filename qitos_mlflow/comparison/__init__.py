"""Evaluations of the same tasks compared: runs paired by task, differences, intervals, tests."""
