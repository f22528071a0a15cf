"""One file a paper: its claim as a runnable experiment with a verdict."""
