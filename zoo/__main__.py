"""`python -m zoo` is the command `zoo`."""

from zoo.cli import entry_point

if __name__ == "__main__":
    entry_point()
