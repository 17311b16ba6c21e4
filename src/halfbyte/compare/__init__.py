"""`halfbyte compare`: several methods, several seeds, one report.

`schema.Report` is what a comparison found out; `render.write_report` makes the pages from it.
"""
