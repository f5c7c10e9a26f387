"""Privacy: what hides a client or an example."""
