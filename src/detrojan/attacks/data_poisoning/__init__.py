"""Attacks that change training images and labels, and nothing else."""
