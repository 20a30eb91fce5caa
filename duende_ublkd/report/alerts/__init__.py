"""What brings alerts to people: the desk, which keeps them, and what carries them to each sink."""
