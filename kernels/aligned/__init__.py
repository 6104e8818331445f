"""Attention between two grids of equal shape: a query sees the keys at and around its own place."""
