"""Split and permuted MNIST: one protocol, a row per method."""
