"""Configs of acme, searched after loomtune's own."""
