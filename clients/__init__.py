"""What runs at a client."""
