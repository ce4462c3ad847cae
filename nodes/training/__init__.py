"""The training node: schema and execution, its live display, and its options nodes."""
