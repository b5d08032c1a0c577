"""Clouds, by SkyPilot."""
