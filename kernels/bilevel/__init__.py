"""Bi-level routing attention: regions choose regions, tokens attend inside what their region has chosen."""
