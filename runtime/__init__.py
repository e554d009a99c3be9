"""The run time: what ``import jagtile`` offers. Importing it is light and changes nothing."""

__version__ = "0.1.0"

__all__ = ["__version__"]
