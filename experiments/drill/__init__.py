"""`fedpeft drill`: a small federation in which one thing breaks, and whether what follows is what was declared."""
