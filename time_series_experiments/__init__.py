"""Mixtures of decays against what theory allows, and two series nobody generated.

``python -m time_series_experiments.exp_synthetic_ndecay`` trains models with N states
on a signal with K decays; ``exp_real_series`` forecasts sunspots and carbon dioxide;
``plot_runs`` draws what their log holds. ``bound`` is the theory.
"""
