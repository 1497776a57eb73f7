"""Qwen2 written out for CUDA: decoder, training step, and their kernels. Imports neither chat nor training."""

IGNORE_INDEX = -100  # the label that torch's cross-entropy leaves out of the loss
