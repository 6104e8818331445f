"""Pictures and figures of what a model attends to."""

from zoo.analysis.neighborhood import explain_neighborhood

__all__ = ["explain_neighborhood"]
