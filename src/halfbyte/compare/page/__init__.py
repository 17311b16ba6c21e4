"""A report's pages: what they say, a `document.Document` that is made once, and two ways to write it down."""
