"""Perceptual losses that understand drawings (Seo 2025), and what it takes to train with them."""

__version__ = "0.1.0"
