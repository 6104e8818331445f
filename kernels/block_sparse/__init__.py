"""Attention over listed pairs of query and key blocks; README.md has the mathematics."""
