"""See DESIGN: room transfer."""
