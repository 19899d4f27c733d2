"""What a study file may say, how it is read, the grid that it spans, and what can be known to fail.

The Snakefile reads it at every parse: nothing here imports torch or a method.
"""
