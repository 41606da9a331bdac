"""See DESIGN: room view."""
