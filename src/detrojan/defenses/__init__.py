"""Defenses: one file each, in the folder that is its threat model.

``data_free`` methods are given the model alone, ``clean_data`` methods the defender's clean sample
too, and ``known_trigger`` methods triggered copies of that sample besides.
"""
