"""Attacks: one file each, in the folder that is its threat model."""
