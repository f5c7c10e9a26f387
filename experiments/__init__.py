"""Configurations, compositions and studies; `cli.py` is where everything meets."""
