"""Frozen base models: loading, encoding of examples, scores, fingerprints."""
