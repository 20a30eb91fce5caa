"""What decides. No clock, no os, no asyncio, no logging, no third party: everything here fits in a unit test."""
