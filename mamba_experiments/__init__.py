"""Mamba and its variants on recall and on text: document 1's comparison, done again.

``python -m mamba_experiments.train`` trains one model on one dataset;
``mamba_experiments.models`` is the list of models.
"""
