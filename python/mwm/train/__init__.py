"""See DESIGN: room train."""
