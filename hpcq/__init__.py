"""hpcq: Python functions and shell commands on HPC nodes that have no way out."""
