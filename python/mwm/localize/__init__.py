"""See DESIGN: room localize."""
