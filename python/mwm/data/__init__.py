"""See DESIGN: room data."""
