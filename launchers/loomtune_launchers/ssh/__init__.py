"""Hosts that ssh reaches."""
