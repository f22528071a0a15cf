"""Plain, slow forms that the library is held against."""
