"""Raw tables and how their rows are dealt to clients: no tokenizer, no model."""
