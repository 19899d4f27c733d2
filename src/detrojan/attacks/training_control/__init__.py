"""Attacks that control training: they poison each batch on the fly."""
