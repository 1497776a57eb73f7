"""What the page says and does around an engine: replies, the line, the allowance, transcripts, its words and looks."""
