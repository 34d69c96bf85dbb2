"""Runs side by side: their records as one value, and the page that draws it."""
