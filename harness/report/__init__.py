"""Tables and figures from a store: `terminal.print_tables` and `markdown.write_report`. Nothing here imports torch."""
