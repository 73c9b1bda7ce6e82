"""The only place where specs become objects."""
