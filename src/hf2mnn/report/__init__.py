"""The comparison: a table, gates, and a page."""
