"""See DESIGN: room sparse."""
