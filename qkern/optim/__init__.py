"""Optimizers whose state may live outside fast memory."""
