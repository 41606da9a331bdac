"""See DESIGN: room masking."""
