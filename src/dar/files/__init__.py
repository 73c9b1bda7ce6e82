"""What is read and written: text and JSON from outside, tables, transcripts, and where files are."""
