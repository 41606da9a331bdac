"""See DESIGN: room ops."""
