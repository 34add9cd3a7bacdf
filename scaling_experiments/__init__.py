"""Experiments on scaling: training, time, memory, generation, and conditioning."""
