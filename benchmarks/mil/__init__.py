"""Trains a TransMIL-style classifier of bags with exact attention, nystrom-attention and nystrom_ext, side by side."""
