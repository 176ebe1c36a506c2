"""Memory and number formats."""
