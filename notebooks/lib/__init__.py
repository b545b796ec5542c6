"""What serves one page of the book: it imports the package, and is never imported by it."""
