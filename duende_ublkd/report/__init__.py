"""What tells people."""
