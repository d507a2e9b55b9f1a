"""The command line: what a command does between its options and a run, and what it prints.

The only package that knows click and rich. Calls runs/ and cluster/; nothing below imports it.
"""
