"""Reports made from the logs of ``mamba_experiments.train``: figures and tables."""
