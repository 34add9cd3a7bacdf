"""Structured state-space duality in NumPy, and the contract that every package shares.

``experiments.common`` is the contract (result, log, command line, figures);
``experiments.registry`` finds the experiments of every package;
``experiments.verify_ssd`` runs this package's claims once.
"""
