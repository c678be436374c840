"""What runs for each connection; nothing here knows who calls it."""
