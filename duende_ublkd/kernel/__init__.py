"""What touches Linux."""
