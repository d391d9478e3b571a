"""Overrides for JAX."""

__all__ = []
