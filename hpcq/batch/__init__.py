"""Batch systems: how pilots get onto compute nodes. ``base`` has the interface, one file for each system."""
