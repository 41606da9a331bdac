"""See DESIGN: room mim."""
