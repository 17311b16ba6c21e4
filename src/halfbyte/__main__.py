"""`python -m halfbyte` is the same as `halfbyte`."""

from halfbyte.cli import main

if __name__ == "__main__":
    main()
