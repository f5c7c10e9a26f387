"""Measurements of speed and memory. Each prints what it measured, on what, against which baseline; none is a test."""
