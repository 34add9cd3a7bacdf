"""Generators and loaders of datasets: each makes its data from a seed or a folder."""
