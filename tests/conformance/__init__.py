"""Other projects' test cases against our kernels, written anew from what the cases are.

This folder mirrors no part of the source tree: its files follow bitsandbytes' test files (and torchao's NF4 ones).
docs/bitsandbytes.md has the table, original group by group, which `test_table.py` holds against these files.
"""
