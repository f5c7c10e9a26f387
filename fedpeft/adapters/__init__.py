"""Adapters, one PEFT family per file; `base.py` holds the protocol."""
