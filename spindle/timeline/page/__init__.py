"""The page of the timeline: its data, its parts as HTML, its scripts."""
