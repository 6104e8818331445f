"""Norm and rotary positions of queries and keys."""
