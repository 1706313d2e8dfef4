"""Mesh, logical-axis rules and the sharding plan as text."""
