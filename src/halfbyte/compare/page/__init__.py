"""A report's pages. What they say is a `document.Document`, made once; HTML and Markdown are two ways to write it down."""
