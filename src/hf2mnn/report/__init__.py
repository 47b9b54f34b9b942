"""Report: summary table, gates, page, and comparison of versions, from the files of the other stages."""
