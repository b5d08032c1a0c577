"""Small networks behind sublayers or blocks."""
