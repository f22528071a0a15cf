"""Data sets behind one face; the `datasets` library does the loading."""
