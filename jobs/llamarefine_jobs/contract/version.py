"""The package's version: part of every artifact's key, and the default tag of the images."""

__version__ = "0.1.0"
