"""Text as it comes: files, streams, lines and documents, read in chunks by many processes."""
