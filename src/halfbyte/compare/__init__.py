"""Several methods, several seeds, one report: `halfbyte compare`."""
