"""Compare and show: configurations, run folders, reports."""
