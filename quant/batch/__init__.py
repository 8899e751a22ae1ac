"""Quantizing without a graph and a server: the command line of quantize.py, and lists of jobs."""
