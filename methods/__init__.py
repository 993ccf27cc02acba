"""Training algorithms, one file a method: two functions, collect and loss."""
