"""Every new checkpoint evaluated by itself."""
