"""Convolutional networks as matrix products."""
