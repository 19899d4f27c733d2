"""How results are written, read and traced: files, the columns that tables share, digests of code."""
