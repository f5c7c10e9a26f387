"""Masks: transformers' attention masks where torch.func maps a model over the examples of a batch."""

from collections.abc import Iterator
from contextlib import contextmanager

SHORTCUTS = ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa")  # transformers' own names: a test pins them


@contextmanager
def every_mask_made() -> Iterator[None]:
    """Without the shortcuts for batches that have no padding: they ask a tensor for its values, which vmap cannot answer.

    Raises `AttributeError` if transformers has them no more under these names.
    """
    from transformers import masking_utils

    own = {name: getattr(masking_utils, name) for name in SHORTCUTS}
    try:
        for name in SHORTCUTS:
            setattr(masking_utils, name, lambda *_, **__: False)
        yield
    finally:
        for name, shortcut in own.items():
            setattr(masking_utils, name, shortcut)
