"""skipcat-edge: low-rank language models for small devices."""

__version__ = "0.1.0"
